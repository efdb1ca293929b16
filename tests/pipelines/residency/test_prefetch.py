"""Prefetching beside a run: from the loader process to the run that acquires the component."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.base import Component, ExecutionMode, UnusableWeights, Weights
from pipelines.loading import load_component
from pipelines.residency.host_cache import HostMemoryExhausted
from pipelines.residency.loader_process import LoaderProcess, LoaderProcessError
from pipelines.residency.packed import PackedModule
from pipelines.residency.prefetch import Prefetcher, PrefetchRequest, prefetch_component
from pipelines.residency.residency import PrefetchCancelled, Residency
from tests.pipelines.residency.test_residency import MIXED_BYTES, Loads, Mixed, X, component, large
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import video as tiny_video

CPU = torch.device("cpu")
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def loader_process() -> Iterator[LoaderProcess]:
    """One for all tests here, since it takes seconds to start. After a kill it starts again when it is used."""
    made = LoaderProcess()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.make_flux(tmp_path_factory.mktemp("weights") / "flux-dev", "dev")


@pytest.fixture(params=[False, True], ids=["host is device", "host copies to device"])
def residency(request: pytest.FixtureRequest) -> Residency:
    return Residency("cpu", copies_to_device=request.param)


def packed(_: Component) -> PackedModule:
    return PackedModule.of(Mixed())


def fail(part: Component) -> Any:
    pytest.fail(f"{part.name} is loaded again")


class Gate:
    """A loader that blocks until `open` is set, or until it is stopped."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.stopped = False

    def __call__(self, part: Component) -> PackedModule:
        self.begun.set()
        assert self.open.wait(TIMEOUT_S)
        if self.stopped:
            raise LoaderProcessError("stopped")
        return packed(part)

    def stop(self) -> None:
        self.stopped = True
        self.open.set()


def in_thread(act: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Runs `act` on another thread. Returns the thread, and a list that will hold what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


# The loader process


@pytest.mark.parametrize("kind", ["flux", "wan", "ltx"])
def test_another_process_loads_the_same_module_bit_by_bit(
    loader_process: LoaderProcess, folder: Path, tmp_path: Path, kind: str
):
    if kind == "flux":
        weights = tiny_flux.weights_of(folder)
    else:
        made = tiny_video.make_ltx(tmp_path / kind) if kind == "ltx" else tiny_video.make_wan(tmp_path / kind, "i2v")
        weights = tiny_video.video_weights_of(made)
    for part in weights.components:
        there, here = loader_process.load(weights, part, CPU), PackedModule.of(load_component(part))
        assert there.weights_bytes == here.weights_bytes
        assert [(block.start, block.end) for block in there.layout.blocks] == [
            (block.start, block.end) for block in here.layout.blocks
        ]
        for (name, tensor), expected in zip(
            there.loaded.state_dict().items(), here.loaded.state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype, name
            assert there.host.data_ptr() <= tensor.data_ptr() < there.host.data_ptr() + there.host.nbytes
        assert not there.loaded.training and not any(each.requires_grad for each in there.loaded.parameters())


def test_a_missing_file_is_reported_and_the_process_goes_on(
    loader_process: LoaderProcess, folder: Path, tmp_path: Path
):
    broken = Path(shutil.copytree(folder, tmp_path / "flux-dev"))
    weights = tiny_flux.weights_of(broken)
    next((broken / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(LoaderProcessError, match=r"vae: no safetensors file"):
        loader_process.load(weights, weights.component("vae"), CPU)
    assert loader_process.load(weights, weights.component("transformer"), CPU).weights_bytes


def test_a_killed_process_is_reported_and_another_one_is_started(loader_process: LoaderProcess, folder: Path):
    weights = tiny_flux.weights_of(folder)
    loader_process.load(weights, weights.component("vae"), CPU)
    os.kill(loader_process.pid or 0, signal.SIGKILL)
    with pytest.raises(LoaderProcessError, match="has exited"):
        loader_process.load(weights, weights.component("vae"), CPU)
    assert loader_process.load(weights, weights.component("vae"), CPU).weights_bytes


# Residency of prefetched components


def test_a_prefetched_component_is_resident_and_not_loaded_again(residency: Residency):
    prefetch_component(residency, component(), packed, to_device=True)
    assert residency.resident() == (("k", MIXED_BYTES),)
    assert torch.equal(residency.acquire(component(), fail)(X), Mixed()(X))


def test_a_component_prefetched_into_host_memory_is_copied_and_not_loaded_again():
    residency = Residency("cpu", copies_to_device=True)
    prefetch_component(residency, component(), packed, to_device=False)
    assert residency.resident() == ()
    assert [(each.key, each.host_bytes) for each in residency.component_statuses()] == [("k", MIXED_BYTES)]
    assert torch.equal(residency.acquire(component(), fail)(X), Mixed()(X))


def test_acquiring_a_pending_component_waits_and_it_is_loaded_once(residency: Residency):
    gate = Gate()
    thread, raised = in_thread(lambda: prefetch_component(residency, component(), gate, to_device=True))
    assert gate.begun.wait(TIMEOUT_S)
    other, other_raised = in_thread(lambda: residency.acquire(component(), fail))
    gate.open.set()
    thread.join(), other.join()
    assert (raised, other_raised) == ([], [])


def test_a_failed_prefetch_leaves_nothing_and_the_run_raises_the_error_itself(residency: Residency):
    def broken(_: Component) -> Any:
        raise UnusableWeights("truncated")

    with pytest.raises(UnusableWeights):
        prefetch_component(residency, component(weights_bytes=10), broken)
    assert residency.resident() == residency.component_statuses() == ()
    with pytest.raises(UnusableWeights):
        residency.acquire(component(), broken)
    residency.acquire(component(), Loads())


def test_evicting_cancels_a_prefetch_and_returns_once_nothing_of_it_is_left(residency: Residency):
    gate = Gate()
    thread, raised = in_thread(
        lambda: prefetch_component(residency, component(weights_bytes=10), gate, True, gate.stop)
    )
    assert gate.begun.wait(TIMEOUT_S)
    assert residency.resident() == (("k", 10),), "its bytes are reserved"
    residency.evict("k")
    assert residency.resident() == residency.component_statuses() == ()
    thread.join()
    assert [type(error) for error in raised] == [PrefetchCancelled]


def test_pending_copies_count_and_never_displace_components_of_the_run():
    residency = Residency("cpu", copies_to_device=True, host_budget_bytes=2 * MIXED_BYTES)
    residency.begin_run(ExecutionMode(), ["run"])
    for key in ("run", "old"):
        prefetch_component(residency, component(key, MIXED_BYTES), packed, to_device=False)
    prefetch_component(residency, component("new", MIXED_BYTES), packed, to_device=False)
    assert [each.key for each in residency.component_statuses()] == ["run", "new"], "the run's component stays"
    with pytest.raises(HostMemoryExhausted):
        prefetch_component(residency, component("large", 2 * MIXED_BYTES), packed, to_device=False)


def test_a_run_that_needs_host_memory_cancels_the_prefetch():
    residency = Residency("cpu", copies_to_device=True, host_budget_bytes=MIXED_BYTES)
    gate = Gate()
    thread, raised = in_thread(
        lambda: prefetch_component(residency, component("next", MIXED_BYTES), gate, True, gate.stop)
    )
    assert gate.begun.wait(TIMEOUT_S)
    residency.acquire(component("run", MIXED_BYTES), Loads())
    thread.join()
    assert [type(error) for error in raised] == [PrefetchCancelled]
    assert residency.resident() == (("run", MIXED_BYTES),)


def test_weights_moved_beside_a_run_are_not_its_working_memory():
    size_bytes = 128 * 2**20
    residency = Residency("cpu")
    residency.begin_run(ExecutionMode())
    residency.enter_phase("denoise")
    prefetch_component(
        residency,
        component(weights_bytes=size_bytes),
        lambda _: PackedModule.of(large(size_bytes)),
        to_device=True,
    )
    residency.enter_phase("decode")
    residency.evict("k")
    peaks = {peak.phase: peak.working_bytes for peak in residency.end_run()}
    assert peaks["decode"] < size_bytes / 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_the_buffer_of_a_prefetch_is_not_working_memory_of_the_run():
    residency, size_bytes = Residency("cuda"), 256 * 2**20
    residency.begin_run(ExecutionMode())
    residency.enter_phase("denoise")
    prefetch_component(residency, component(weights_bytes=size_bytes), lambda _: PackedModule.of(large(size_bytes)))
    (peak,) = residency.end_run()
    assert peak.working_bytes < size_bytes / 8
    residency.clear()


# Requests


class RecordedPrefetcher:
    """A `Prefetcher` that records how each request ended."""

    def __init__(self, residency: Residency, loader_process: LoaderProcess) -> None:
        self.ended = threading.Event()
        self.failures: dict[str, str] = {}
        self.prefetcher = Prefetcher(residency, self.on_event, loader_process)

    def on_event(self, job_id: str, failure: str | None) -> None:
        if failure is not None:
            self.failures[job_id] = failure
            self.ended.set()

    def submit(self, weights: Weights, *names: str, job_id: str = "next") -> str:
        keys = tuple(weights.component(name).key for name in names)
        self.ended.clear()
        self.prefetcher.submit(PrefetchRequest(job_id, weights, keys))
        assert self.ended.wait(TIMEOUT_S)
        return self.failures[job_id]


def test_a_request_loads_its_components_one_after_the_other(
    loader_process: LoaderProcess, folder: Path, residency: Residency
):
    weights, prefetcher = tiny_flux.weights_of(folder), RecordedPrefetcher(residency, loader_process)
    assert prefetcher.submit(weights, "text_encoder", "transformer") == ""
    assert dict(residency.resident()).keys() == {
        weights.component(name).key for name in ("text_encoder", "transformer")
    }
    expected = load_component(weights.component("transformer")).state_dict()
    acquired = residency.acquire(weights.component("transformer"), fail).state_dict()
    assert all(torch.equal(acquired[name], expected[name]) for name in expected)


def test_a_failed_request_keeps_what_was_loaded_and_reports_why(
    loader_process: LoaderProcess, folder: Path, tmp_path: Path
):
    broken = Path(shutil.copytree(folder, tmp_path / "flux-dev"))
    weights, residency = tiny_flux.weights_of(broken), Residency("cpu")
    next((broken / "vae").glob("*.safetensors")).write_bytes(b"short")
    prefetcher = RecordedPrefetcher(residency, loader_process)
    assert "vae" in prefetcher.submit(weights, "transformer", "vae", "text_encoder")
    assert [key for key, _ in residency.resident()] == [weights.component("transformer").key]
    assert prefetcher.submit(weights, "text_encoder", job_id="another") == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_a_prefetched_component_has_the_same_bits_and_the_allocators_bytes():
    residency, size_bytes = Residency("cuda"), 256 * 2**20
    residency.acquire(component("run"), Loads(lambda: large(2**20)))
    before = torch.cuda.memory_allocated()
    work = torch.randn(4096, 4096, device="cuda")
    make = lambda _: PackedModule.of(large(size_bytes))  # noqa: E731
    thread, raised = in_thread(
        lambda: prefetch_component(residency, component("next"), make, to_device=True),
    )
    for _ in range(100):
        work = (work @ work).clamp(-1, 1)
    thread.join()
    assert raised == []
    module = residency.acquire(component("next"), fail)
    assert all(bool((part == 1).all()) and part.is_cuda for part in module.parts)
    del work
    assert torch.cuda.memory_allocated() - before == size_bytes
    residency.clear()
