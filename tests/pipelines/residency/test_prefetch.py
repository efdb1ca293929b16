"""Weights that come while another run is under way: from the process that loads them to the run that finds them."""

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
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def apart() -> Iterator[LoaderProcess]:
    """It takes seconds to start: one for all tests here. Whoever kills it has it start again."""
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
    """A loader that waits until it is let go, or stopped."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.stopped = False

    def __call__(self, part: Component) -> PackedModule:
        self.begun.set()
        assert self.open.wait(PATIENCE_S)
        if self.stopped:
            raise LoaderProcessError("stopped")
        return packed(part)

    def stop(self) -> None:
        self.stopped = True
        self.open.set()


def beside(act: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """What another thread does, and what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


# What one process hands to another


@pytest.mark.parametrize("kind", ["flux", "wan", "ltx"])
def test_another_process_loads_the_same_module_bit_by_bit(
    apart: LoaderProcess, folder: Path, tmp_path: Path, kind: str
):
    if kind == "flux":
        weights = tiny_flux.weights_of(folder)
    else:
        made = tiny_video.make_ltx(tmp_path / kind) if kind == "ltx" else tiny_video.make_wan(tmp_path / kind, "i2v")
        weights = tiny_video.video_weights_of(made)
    for part in weights.components:
        there, here = apart.load(weights, part, CPU), PackedModule.of(load_component(part))
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


def test_a_file_that_is_gone_is_told_and_the_process_serves_on(apart: LoaderProcess, folder: Path, tmp_path: Path):
    broken = Path(shutil.copytree(folder, tmp_path / "flux-dev"))
    weights = tiny_flux.weights_of(broken)
    next((broken / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(LoaderProcessError, match=r"vae: no safetensors file"):
        apart.load(weights, weights.component("vae"), CPU)
    assert apart.load(weights, weights.component("transformer"), CPU).weights_bytes


def test_a_process_that_was_killed_is_told_and_another_one_is_started(apart: LoaderProcess, folder: Path):
    weights = tiny_flux.weights_of(folder)
    apart.load(weights, weights.component("vae"), CPU)
    os.kill(apart.pid or 0, signal.SIGKILL)
    with pytest.raises(LoaderProcessError, match="has exited"):
        apart.load(weights, weights.component("vae"), CPU)
    assert apart.load(weights, weights.component("vae"), CPU).weights_bytes


# What is where


def test_what_was_fetched_is_there_and_is_not_loaded_again(residency: Residency):
    prefetch_component(residency, component(), packed, to_device=True)
    assert residency.resident() == (("k", MIXED_BYTES),)
    assert torch.equal(residency.acquire(component(), fail)(X), Mixed()(X))


def test_what_was_fetched_into_host_memory_is_one_copy_away():
    residency = Residency("cpu", copies_to_device=True)
    prefetch_component(residency, component(), packed, to_device=False)
    assert residency.resident() == ()
    assert [(each.key, each.host_bytes) for each in residency.component_statuses()] == [("k", MIXED_BYTES)]
    assert torch.equal(residency.acquire(component(), fail)(X), Mixed()(X))


def test_whoever_wants_to_hold_what_is_on_its_way_waits_and_it_is_loaded_once(residency: Residency):
    gate = Gate()
    thread, raised = beside(lambda: prefetch_component(residency, component(), gate, to_device=True))
    assert gate.begun.wait(PATIENCE_S)
    holder, refused = beside(lambda: residency.acquire(component(), fail))
    gate.open.set()
    thread.join(), holder.join()
    assert (raised, refused) == ([], [])


def test_a_fetch_that_fails_leaves_nothing_and_the_run_meets_the_error_itself(residency: Residency):
    def broken(_: Component) -> Any:
        raise UnusableWeights("truncated")

    with pytest.raises(UnusableWeights):
        prefetch_component(residency, component(weights_bytes=10), broken)
    assert residency.resident() == residency.component_statuses() == ()
    with pytest.raises(UnusableWeights):
        residency.acquire(component(), broken)
    residency.acquire(component(), Loads())


def test_an_evict_calls_off_what_is_on_its_way_and_comes_back_once_nothing_of_it_is_left(residency: Residency):
    gate = Gate()
    thread, raised = beside(lambda: prefetch_component(residency, component(weights_bytes=10), gate, True, gate.stop))
    assert gate.begun.wait(PATIENCE_S)
    assert residency.resident() == (("k", 10),), "its bytes are promised"
    residency.evict("k")
    assert residency.resident() == residency.component_statuses() == ()
    thread.join()
    assert [type(error) for error in raised] == [PrefetchCancelled]


def test_copies_that_are_being_made_count_and_never_take_the_place_of_what_the_run_may_hold():
    residency = Residency("cpu", copies_to_device=True, host_budget_bytes=2 * MIXED_BYTES)
    residency.begin_run(ExecutionMode(), ["run"])
    for key in ("run", "old"):
        prefetch_component(residency, component(key, MIXED_BYTES), packed, to_device=False)
    prefetch_component(residency, component("new", MIXED_BYTES), packed, to_device=False)
    assert [each.key for each in residency.component_statuses()] == ["run", "new"], "what the run may hold stays"
    with pytest.raises(HostMemoryExhausted):
        prefetch_component(residency, component("large", 2 * MIXED_BYTES), packed, to_device=False)


def test_a_run_that_needs_the_room_gets_it():
    residency = Residency("cpu", copies_to_device=True, host_budget_bytes=MIXED_BYTES)
    gate = Gate()
    thread, raised = beside(
        lambda: prefetch_component(residency, component("next", MIXED_BYTES), gate, True, gate.stop)
    )
    assert gate.begun.wait(PATIENCE_S)
    residency.acquire(component("run", MIXED_BYTES), Loads())
    thread.join()
    assert [type(error) for error in raised] == [PrefetchCancelled]
    assert residency.resident() == (("run", MIXED_BYTES),)


def test_what_comes_or_goes_beside_a_run_is_not_taken_for_its_working_memory():
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


# Errands


class Told:
    """What the prefetching thread says, and the resident components when it said so."""

    def __init__(self, residency: Residency, apart: LoaderProcess) -> None:
        self.ended = threading.Event()
        self.failures: dict[str, str] = {}
        self.prefetcher = Prefetcher(residency, self.tell, apart)

    def tell(self, job_id: str, failure: str | None) -> None:
        if failure is not None:
            self.failures[job_id] = failure
            self.ended.set()

    def bring(self, weights: Weights, *names: str, job_id: str = "next") -> str:
        keys = tuple(weights.component(name).key for name in names)
        self.ended.clear()
        self.prefetcher.submit(PrefetchRequest(job_id, weights, keys))
        assert self.ended.wait(PATIENCE_S)
        return self.failures[job_id]


def test_an_errand_brings_its_components_one_after_the_other(apart: LoaderProcess, folder: Path, residency: Residency):
    weights, told = tiny_flux.weights_of(folder), Told(residency, apart)
    assert told.bring(weights, "text_encoder", "transformer") == ""
    assert dict(residency.resident()).keys() == {
        weights.component(name).key for name in ("text_encoder", "transformer")
    }
    expected = load_component(weights.component("transformer")).state_dict()
    held = residency.acquire(weights.component("transformer"), fail).state_dict()
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_an_errand_that_breaks_off_keeps_what_came_and_says_why(apart: LoaderProcess, folder: Path, tmp_path: Path):
    broken = Path(shutil.copytree(folder, tmp_path / "flux-dev"))
    weights, residency = tiny_flux.weights_of(broken), Residency("cpu")
    next((broken / "vae").glob("*.safetensors")).write_bytes(b"short")
    told = Told(residency, apart)
    assert "vae" in told.bring(weights, "transformer", "vae", "text_encoder")
    assert [key for key, _ in residency.resident()] == [weights.component("transformer").key]
    assert told.bring(weights, "text_encoder", job_id="another") == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_what_comes_beside_a_run_is_the_same_bits_and_the_allocators_bytes():
    residency, size_bytes = Residency("cuda"), 256 * 2**20
    residency.acquire(component("run"), Loads(lambda: large(2**20)))
    before = torch.cuda.memory_allocated()
    work = torch.randn(4096, 4096, device="cuda")
    make = lambda _: PackedModule.of(large(size_bytes))  # noqa: E731
    thread, raised = beside(
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
