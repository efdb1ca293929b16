"""Packed weights on the host, on the device, evicted and loaded again: outputs are always the same bits."""

import random
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from pipelines.base import Component, UnusableWeights
from pipelines.residency.packed import ALIGNMENT_BYTES
from pipelines.residency.residency import Residency

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Mixed(nn.Module):
    """Tied weights, a view of another's memory, four dtypes, persistent and other buffers, odd sizes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.alias = nn.Parameter(self.first.weight.data)
        self.few = nn.Parameter(torch.randn(3, generator=generator).to(torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("positions", torch.arange(5), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.empty(0))
        with torch.no_grad():
            self.first.weight.normal_(generator=generator)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.tied(self.first(x)) @ self.alias * self.scalar
        return torch.cat([y.flatten(), self.few.float(), self.positions, self.mask])


MIXED_BYTES = 64 + 64 + 64 + 64 + 64
"""4x4 float32 once, 3 bfloat16, 1 float32, 5 int64, 3 bools, nothing: each rounded up to 64."""


class Loads:
    """A loader that records the keys that it loaded."""

    def __init__(self, make: Callable[[], object] = Mixed) -> None:
        self.make = make
        self.keys: list[str] = []

    def __call__(self, component: Component) -> object:
        self.keys.append(component.key)
        return self.make()


def component(key: str = "k", weights_bytes: int = 0) -> Component:
    return Component("transformer", key, weights_bytes, Path("/nowhere"))


@pytest.fixture(params=[False, True], ids=["host is device", "host copies to device"])
def residency(request: pytest.FixtureRequest) -> Residency:
    return Residency("cpu", copies_to_device=request.param)


def test_a_key_is_loaded_once_and_the_same_object_is_returned(residency: Residency):
    loads = Loads()
    assert residency.acquire(component(), loads) is residency.acquire(component(), loads)
    assert loads.keys == ["k"]


def test_the_least_recently_used_comes_first_with_the_bytes_of_its_buffer(residency: Residency):
    for key in ("a", "b", "a"):
        residency.acquire(component(key), Loads())
    assert residency.resident() == (("b", MIXED_BYTES), ("a", MIXED_BYTES))


def test_every_tensor_is_an_aligned_view_into_one_buffer_and_keeps_its_bits(residency: Residency):
    module = residency.acquire(component(), Loads())
    for packed, plain in zip(module.state_dict().values(), Mixed().state_dict().values(), strict=True):
        assert packed.dtype == plain.dtype
        assert torch.equal(packed, plain)
        assert packed.numel() == 0 or packed.data_ptr() % ALIGNMENT_BYTES == 0
    assert torch.equal(module.positions, torch.arange(5))
    assert len({tensor.untyped_storage().data_ptr() for tensor in module.parameters()}) == 1


def test_tied_weights_stay_tied(residency: Residency):
    for _ in range(2):
        module = residency.acquire(component(), Loads())
        assert module.tied.weight is module.first.weight
        assert module.alias.data_ptr() == module.first.weight.data_ptr()
        residency.evict("k")


def test_outputs_are_the_same_bits_after_100_random_swaps(residency: Residency):
    seeds = {"a": 1, "b": 2, "c": 3}
    chance = random.Random(5)
    for _ in range(100):
        key = chance.choice("abc")
        module = residency.acquire(component(key), Loads(lambda key=key: Mixed(seeds[key])))
        assert torch.equal(module(X), Mixed(seeds[key])(X))
        residency.evict(chance.choice("abc"))


def test_evicting_keeps_the_module_and_its_host_copy():
    residency, loads = Residency("cpu", copies_to_device=True), Loads()
    module = residency.acquire(component(), loads)
    on_device = weakref.ref(module.scalar.untyped_storage())
    residency.evict("k")
    assert residency.resident() == ()
    assert on_device() is None
    assert torch.equal(module(X), Mixed()(X))  # on the host
    assert residency.acquire(component(), loads) is module
    assert loads.keys == ["k"]


def test_on_a_cpu_evicting_drops_the_weights_and_acquiring_loads_them_again():
    residency, loads = Residency("cpu"), Loads()
    module = residency.acquire(component(), loads)
    residency.evict("k")
    assert sum(tensor.nbytes for tensor in module.parameters()) == 0
    assert residency.acquire(component(), loads) is not module
    assert loads.keys == ["k", "k"]


def test_the_memory_of_an_evicted_module_returns_to_the_system():
    residency, size_bytes = Residency("cpu"), 256 * 2**20
    before = psutil.Process().memory_info().rss
    module = residency.acquire(component(), Loads(lambda: large(size_bytes)))
    during = psutil.Process().memory_info().rss
    residency.evict("k")
    after = psutil.Process().memory_info().rss
    assert during - before > 0.95 * size_bytes
    assert after - before < 0.05 * size_bytes
    assert module is not None  # even while the module is referenced


def test_packing_frees_each_tensor_that_it_has_copied():
    module = large(256 * 2**20)
    tensors = [weakref.ref(tensor.untyped_storage()) for tensor in module.parameters()]
    Residency("cpu").acquire(component(), Loads(lambda: module))
    assert not any(storage() for storage in tensors)


def large(size_bytes: int) -> nn.Module:
    module = nn.Module()
    module.parts = nn.ParameterList([torch.ones(size_bytes // 8 // 4) for _ in range(8)])
    return module.requires_grad_(False)


def test_evicting_what_is_not_resident_changes_nothing(residency: Residency):
    residency.acquire(component(), Loads())
    residency.evict("other")
    assert residency.resident() == (("k", MIXED_BYTES),)


def test_clear_frees_the_host_copies_too(residency: Residency):
    loads = Loads()
    module = residency.acquire(component("a"), loads)
    residency.acquire(component("b"), loads)
    residency.evict("b")
    residency.clear()
    assert residency.resident() == ()
    assert module.scalar.nbytes == 0
    residency.acquire(component("a"), loads)
    assert loads.keys == ["a", "b", "a"]


def test_an_object_other_than_a_module_is_kept_as_it_is_and_dropped(residency: Residency):
    class Session:
        pass

    loads = Loads(Session)
    session = weakref.ref(residency.acquire(component(weights_bytes=123), loads))
    assert residency.resident() == (("k", 123),)
    residency.evict("k")
    assert session() is None
    residency.acquire(component(weights_bytes=123), loads)
    assert loads.keys == ["k", "k"]


def test_a_module_without_tensors_can_be_acquired(residency: Residency):
    residency.acquire(component(), Loads(nn.Identity))
    residency.evict("k")
    residency.acquire(component(), Loads(nn.Identity))


def test_a_load_that_fails_leaves_nothing_behind(residency: Residency):
    def fail() -> None:
        raise UnusableWeights("transformer.safetensors: truncated")

    with pytest.raises(UnusableWeights):
        residency.acquire(component(), Loads(fail))
    assert residency.resident() == ()
    assert torch.equal(residency.acquire(component(), Loads())(X), Mixed()(X))


def test_a_device_without_room_leaves_the_host_copy(monkeypatch: pytest.MonkeyPatch):
    def no_room(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError

    residency, loads = Residency("cpu", copies_to_device=True), Loads()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty_like", no_room)
        residency.acquire(component(), loads)
    assert residency.resident() == ()
    assert torch.equal(residency.acquire(component(), loads)(X), Mixed()(X))
    assert loads.keys == ["k"]


def test_weights_first_acquired_in_inference_mode_move_like_others(residency: Residency):
    with torch.inference_mode():
        residency.acquire(component(), Loads())
    residency.evict("k")
    module = residency.acquire(component(), Loads())
    assert not module.first.weight.is_inference()
    assert torch.equal(module(X), Mixed()(X))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_the_bytes_are_the_allocators_and_the_host_copy_is_page_locked():
    residency, size_bytes = Residency("cuda"), 256 * 2**20
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        module = residency.acquire(component(), Loads(lambda: large(size_bytes)))
        assert torch.cuda.memory_allocated() - before == size_bytes == residency.resident()[0][1]
        assert module.parts[7].is_cuda and bool((module.parts[7] == 1).all())
        residency.evict("k")
        assert torch.cuda.memory_allocated() == before
        assert module.parts[7].is_pinned()
    residency.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_outputs_are_the_same_bits_after_100_swaps():
    residency = Residency("cuda")
    first = residency.acquire(component(), Loads())(X.cuda())
    for _ in range(100):
        residency.evict("k")
        assert torch.equal(residency.acquire(component(), Loads())(X.cuda()), first)
    residency.clear()
