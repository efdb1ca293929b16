"""Streamed blocks, phases that evict what they do not need, cached prompts: outputs are always the same bits."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipelines.base import Component, ExecutionMode
from pipelines.flux import Flux, build
from pipelines.loading import load_component
from pipelines.params import TextToImage
from pipelines.residency.host_cache import EmbeddingCache, HostMemoryExhausted
from pipelines.residency.packed import BLOCK_ALIGNMENT_BYTES, PackedModule
from pipelines.residency.residency import Residency
from pipelines.residency.streaming import choose_streamed_blocks
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny.flux import weights_of

X = torch.linspace(-1, 1, 16).reshape(1, 16)
PHASES = ("encode", ("text_encoder", "text_encoder_2")), ("denoise", ("transformer",)), ("decode", ("vae",))


class Stack(nn.Module):
    """Blocks of three sizes. The first and the last share a weight, and all run twice."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter = nn.Linear(16, 16)
        widths = (16, 64, 32, 16, 64, 32, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, width), nn.Linear(width, 16)) for width in widths)
        self.blocks[-1][0].weight = self.blocks[0][0].weight
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, order: Any = range(7)) -> torch.Tensor:
        x = self.enter(x)
        for _ in range(2):
            for n in order:
                x = torch.tanh(self.blocks[n](x))
        return x


def component(key: str = "k", weights_bytes: int = 0) -> Component:
    return Component("transformer", key, weights_bytes, Path("/nowhere"))


def streams(key: str, kept_bytes: int) -> ExecutionMode:
    return ExecutionMode("streamed", phases=(("denoise", (key,)),), streamed_bytes=((key, kept_bytes),))


def test_streamed_blocks_are_evenly_spread_and_the_rest_stays_within_its_bytes():
    assert choose_streamed_blocks([10] * 6, 0) == [True] * 6
    assert choose_streamed_blocks([10] * 6, 60) == [False] * 6
    assert choose_streamed_blocks([10] * 6, 30) == [True, False, True, False, True, False]
    assert choose_streamed_blocks([10] * 6, 20).count(False) == 2
    assert choose_streamed_blocks([], 5) == []


@pytest.mark.parametrize("seed", range(20))
def test_blocks_that_stay_never_exceed_their_bytes(seed: int):
    chance = random.Random(seed)
    sizes = [chance.randrange(1, 100) for _ in range(chance.randrange(1, 40))]
    kept = chance.randrange(0, sum(sizes) + 10)
    stays = sum(size for size, moves in zip(sizes, choose_streamed_blocks(sizes, kept), strict=True) if not moves)
    assert stays <= kept
    assert stays >= kept - 2 * max(sizes) or stays == sum(sizes)


def test_a_block_is_contiguous_and_a_weight_of_two_blocks_is_outside():
    layout = PackedModule.of(Stack()).layout
    assert [block.module for block in layout.blocks] == list(Stack().blocks) or len(layout.blocks) == 7
    for block in layout.blocks:
        assert block.start % BLOCK_ALIGNMENT_BYTES == 0
        for place in block.slots:
            assert block.start <= place.offset and place.end <= block.end
    # `enter` has two tensors; the weight that two blocks share is the third
    assert len(layout.unblocked) == 3


@pytest.mark.parametrize("kept_bytes", [0, 3000, 9000, 10**6])
def test_streamed_outputs_are_the_same_bits(kept_bytes: int):
    residency = Residency("cpu", copies_to_device=True)
    residency.begin_run(streams("k", kept_bytes))
    module = residency.acquire(component(), lambda _: Stack())
    for _ in range(3):
        assert torch.equal(module(X), Stack()(X))


@pytest.mark.parametrize("order", [(6, 5, 4, 3, 2, 1, 0), (0, 0, 3, 3), (2,), (1, 5)])
def test_blocks_may_run_in_any_order(order: tuple[int, ...]):
    residency = Residency("cpu", copies_to_device=True)
    residency.begin_run(streams("k", 0))
    module = residency.acquire(component(), lambda _: Stack())
    assert torch.equal(module(X, order), Stack()(X, order))


def test_streamed_bytes_are_those_outside_of_blocks_those_kept_and_two_buffers():
    residency = Residency("cpu", copies_to_device=True)
    residency.begin_run(streams("k", 0))
    module = residency.acquire(component(), lambda _: Stack())
    layout = PackedModule.of(Stack()).layout
    largest = max(block.size_bytes for block in layout.blocks)
    assert residency.resident() == (("k", layout.unblocked_bytes + 2 * largest),)
    assert residency.component_statuses()[0].streamed
    residency.evict("k")
    assert torch.equal(module(X), Stack()(X)), "back on the host, without hooks"
    assert not any(block._forward_pre_hooks for block in module.blocks)


def test_a_module_is_usable_after_a_block_raised():
    residency = Residency("cpu", copies_to_device=True)
    residency.begin_run(streams("k", 0))
    module = residency.acquire(component(), lambda _: Stack())
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3))
    assert torch.equal(module(X), Stack()(X))


def test_outputs_are_the_same_bits_after_100_random_modes_and_swaps():
    residency = Residency("cpu", copies_to_device=True)
    chance = random.Random(7)
    for _ in range(100):
        key = chance.choice("ab")
        residency.begin_run(
            chance.choice([ExecutionMode(), streams(key, 0), streams(key, 5000), ExecutionMode("staged")])
        )
        module = residency.acquire(component(key), lambda _, key=key: Stack(ord(key)))
        assert torch.equal(module(X), Stack(ord(key))(X))
        if chance.random() < 0.5:
            residency.evict(chance.choice("ab"))


T5 = T5Config(
    vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=4, num_heads=2, feed_forward_proj="gated-gelu"
)  # fmt: skip
CLIP = CLIPTextConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize("kept_bytes", [0, 20_000])
@pytest.mark.parametrize(("kind", "config"), [(T5EncoderModel, T5), (CLIPTextModel, CLIP)])
@torch.inference_mode()
def test_text_encoders_can_be_streamed(kind: Any, config: Any, kept_bytes: int):
    ids = torch.arange(12).reshape(1, 12)
    with torch.inference_mode(False):
        plain = tiny_flux.seeded(1, kind, config)
    residency = Residency("cpu", copies_to_device=True)
    residency.begin_run(streams("k", kept_bytes))
    encoder = residency.acquire(component(), lambda _: tiny_flux.seeded(1, kind, config))
    assert torch.equal(encoder(ids).last_hidden_state, plain(ids).last_hidden_state)
    assert residency.component_statuses()[0].streamed


@pytest.mark.parametrize("mode", [ExecutionMode(), streams("k", 5000)], ids=["whole", "streamed"])
def test_residency_is_consistent_after_an_allocation_failed(monkeypatch: pytest.MonkeyPatch, mode: ExecutionMode):
    def no_room(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError

    residency = Residency("cpu", copies_to_device=True)
    module = Stack()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        residency.begin_run(mode)
        patch.setattr(torch, "empty_like", no_room)
        patch.setattr(torch, "empty", no_room)
        residency.acquire(component(), lambda _: module)
    assert residency.resident() == ()
    assert [status.device_bytes for status in residency.component_statuses()] in ([], [0])
    residency.begin_run(streams("k", 0))
    assert torch.equal(residency.acquire(component(), lambda _: Stack())(X), Stack()(X))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_streamed_and_whole_are_the_same_bits_and_the_bytes_are_the_allocators():
    residency = Residency("cuda")
    x = X.cuda()
    expected = residency.acquire(component(), lambda _: Stack())(x)
    residency.evict("k")
    before = torch.cuda.memory_allocated()
    for kept_bytes in (0, 3000, 9000):
        residency.begin_run(streams("k", kept_bytes))
        module = residency.acquire(component(), lambda _: Stack())
        assert torch.cuda.memory_allocated() - before <= residency.resident()[0][1] + 512 * 16
        for _ in range(10):
            assert torch.equal(module(x), expected)
        residency.evict("k")
    residency.clear()


# A real pipeline in each tier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.make_flux(tmp_path_factory.mktemp("tiny") / "flux-dev", "dev")


def a_flux(folder: Path, **options: Any) -> tuple[Flux, Residency]:
    residency = Residency("cpu", **options)
    return build(tiny_flux.weights_of(folder), residency), residency


def mode_of(folder: Path, tier: Any, tiled: bool = False) -> ExecutionMode:
    weights = tiny_flux.weights_of(folder)
    phases = tuple((name, tuple(weights.component(each).key for each in names)) for name, names in PHASES)
    kept = ((weights.component("transformer").key, 0),) if tier == "streamed" else ()
    return ExecutionMode(tier, tiled, phases, kept)


def resident_names(residency: Residency) -> list[str]:
    return [status.name for status in residency.component_statuses() if status.device_bytes]


def picture(flux: Flux, residency: Residency, mode: ExecutionMode, prompt: str = "a red circle") -> bytes:
    residency.begin_run(mode)
    params = TextToImage(prompt=prompt, width=64, height=64, seed=1, num_inference_steps=2, guidance_scale=3.5)
    return flux.generate(params, lambda phase, step, steps: residency.enter_phase(phase)).tobytes()


@pytest.mark.parametrize("copies", [False, True], ids=["host is device", "host copies to device"])
def test_every_tier_makes_the_same_picture_and_evicts_what_its_phase_does_not_need(folder: Path, copies: bool):
    flux, residency = a_flux(folder, copies_to_device=copies)
    expected = picture(flux, residency, ExecutionMode())
    assert len(resident_names(residency)) == 4
    for _ in range(2):
        for tier in ("staged", "streamed"):
            residency.embeddings.clear()
            assert picture(flux, residency, mode_of(folder, tier)) == expected
            assert resident_names(residency) == ["vae"]
    assert picture(flux, residency, ExecutionMode()) == expected


@pytest.mark.parametrize("copies", [False, True], ids=["host is device", "host copies to device"])
def test_pictures_are_the_same_bits_after_100_random_swaps(folder: Path, copies: bool):
    flux, residency = a_flux(folder, copies_to_device=copies)
    expected = picture(flux, residency, ExecutionMode())
    chance = random.Random(3)
    keys = [part.key for part in weights_of(folder).components]
    parts = {part.key: part for part in weights_of(folder).components}
    residency.begin_run(ExecutionMode())
    for _ in range(100):
        residency.evict(chance.choice(keys))
        residency.acquire(parts[chance.choice(keys)], load_component)
    for tier in ("resident", "staged", "streamed"):
        residency.embeddings.clear()
        assert picture(flux, residency, mode_of(folder, tier)) == expected


def test_a_phase_of_the_staged_tier_has_only_its_own_components(folder: Path):
    flux, residency = a_flux(folder, copies_to_device=True)
    seen: dict[str, set[str]] = {}

    def look(phase: str, step: int, steps: int) -> None:
        residency.enter_phase(phase)
        seen.setdefault(phase, set()).update(resident_names(residency) if step else [])

    residency.begin_run(mode_of(folder, "staged"))
    params = TextToImage(prompt="a cat", width=64, height=64, seed=1, num_inference_steps=2, guidance_scale=3.5)
    flux.generate(params, look)
    assert seen == {"encode": {"text_encoder", "text_encoder_2"}, "denoise": {"transformer"}, "decode": {"vae"}}


def test_a_tiled_decode_makes_nearly_the_same_picture_and_leaves_the_vae_as_it_was(folder: Path):
    flux, residency = a_flux(folder)
    whole = picture(flux, residency, ExecutionMode())
    tiled = picture(flux, residency, mode_of(folder, "resident", tiled=True))
    assert len(tiled) == len(whole)
    assert picture(flux, residency, ExecutionMode()) == whole


def test_a_repeated_prompt_needs_no_text_encoder(folder: Path):
    flux, residency = a_flux(folder)
    first = picture(flux, residency, ExecutionMode())
    residency.clear()
    assert picture(flux, residency, ExecutionMode()) == first
    assert resident_names(residency) == ["transformer", "vae"]
    assert picture(flux, residency, ExecutionMode(), "a blue square") != first
    assert "text_encoder_2" in resident_names(residency)


def test_embeddings_stay_within_their_budget_the_least_recently_used_go():
    kept = EmbeddingCache(budget_bytes=2 * 400)
    made: list[str] = []

    def get(text: str) -> torch.Tensor | None:
        def make() -> list[torch.Tensor]:
            made.append(text)
            return [torch.full((100,), float(len(made)))]

        return kept.get(("encoder", text), torch.device("cpu"), make)[0]

    for text in ("a", "b", "a", "c", "a", "b"):
        get(text)
    assert made == ["a", "b", "c", "b"]
    assert kept.total_bytes == 800


def test_a_phase_is_measured_and_its_weights_are_not_counted(folder: Path):
    flux, residency = a_flux(folder)
    picture(flux, residency, ExecutionMode())
    phases = residency.end_run()
    assert [peak.phase for peak in phases] == ["encode", "denoise", "decode"]
    assert all(0 <= peak.working_bytes < 2**30 for peak in phases)


def test_the_peak_of_a_phase_is_measured():
    residency = Residency("cpu")
    residency.begin_run(ExecutionMode())
    residency.enter_phase("denoise")
    large = torch.ones(64 * 2**20)
    residency.enter_phase("decode")
    del large
    measured = {peak.phase: peak.working_bytes for peak in residency.end_run()}
    assert measured["denoise"] == pytest.approx(256 * 2**20, rel=0.05)


@pytest.mark.parametrize("tier", ["staged", "streamed"])
def test_weights_that_are_loaded_and_evicted_are_not_working_memory(tier: Any):
    size_bytes = 128 * 2**20

    def large(_: Component) -> nn.Module:
        module = nn.Module()
        module.part = nn.Parameter(torch.ones(size_bytes // 4), requires_grad=False)
        return module

    residency = Residency("cpu", copies_to_device=True)
    phases = (("encode", ("a",)), ("denoise", ("b",)), ("decode", ("c",)))
    for _ in range(2):
        residency.begin_run(ExecutionMode(tier, phases=phases))
        for key in "abc":
            residency.acquire(component(key), large)
        for peak in residency.end_run():
            assert peak.working_bytes < size_bytes / 8, peak


# Host memory


def test_host_copies_stay_within_their_budget():
    size = PackedModule.of(Stack()).weights_bytes
    residency = Residency("cpu", copies_to_device=True, host_budget_bytes=2 * size)
    for key in "abc":
        residency.acquire(component(key, size), lambda _: Stack())
        residency.evict(key)
    assert [status.key for status in residency.component_statuses()] == ["b", "c"]
    residency.acquire(component("b", size), lambda _: pytest.fail("it has a copy"))


def test_a_component_larger_than_the_host_budget_is_refused_with_the_numbers_and_nothing_is_lost():
    size = PackedModule.of(Stack()).weights_bytes
    residency = Residency("cpu", copies_to_device=True, host_budget_bytes=size)
    residency.acquire(component("a", size), lambda _: Stack())
    with pytest.raises(HostMemoryExhausted, match="host memory for the copies"):
        residency.acquire(component("b", size), lambda _: Stack())
    assert [status.key for status in residency.component_statuses()] == ["a"]
    residency.evict("a")
    residency.acquire(component("b", size), lambda _: Stack())
    assert [status.key for status in residency.component_statuses()] == ["b"]
