"""torch.compile: each kind of block is compiled once, as one graph; outputs are equal in every tier and after swaps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import diffusion, flux, ltx, wan
from pipelines.base import TIERS, ExecutionMode, Weights
from pipelines.catalog.catalog import Catalog
from pipelines.catalog.reader import load_catalog
from pipelines.catalog.table import CatalogError
from pipelines.params import AppliedLora, TextToImage, TextToVideo
from pipelines.residency.residency import Residency
from tests.pipelines.test_lora import lora
from tests.pipelines.test_quantization import table
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import lora as tiny_lora
from tests.support.tiny import video as tiny_video

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]
PICTURE = TextToImage(prompt="a cat", width=64, height=64, seed=1, num_inference_steps=2, guidance_scale=3.5)
CLIP = TextToVideo(
    prompt="a cat", width=64, height=64, seed=1, num_inference_steps=2, guidance_scale=1.0, num_frames=9, fps=8
)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs passed to the compiler, which here returns them unchanged: outputs are then equal bit for bit."""
    seen: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(diffusion, "COMPILE_BACKEND", keep)
    return seen


def run(family: Any, weights: Weights, params: Any, residency: Residency, tier: str = "resident") -> np.ndarray:
    key = {part.name: part.key for part in weights.components}
    encoders = tuple(key[name] for name in ("text_encoder", "text_encoder_2") if name in key)
    denoisers = (key["transformer"],) + ((key["vae"],) if family is ltx else ())
    phases = (("encode", encoders), ("denoise", denoisers), ("decode", (key["vae"],)))
    residency.begin_run(
        ExecutionMode(tier, phases=phases, streamed_bytes=((key["transformer"], 0),) if tier == "streamed" else ())
    )  # type: ignore[arg-type]
    made = family.build(weights, residency).generate(params, lambda phase, step, steps: residency.enter_phase(phase))
    return np.asarray(made.frames if isinstance(params, TextToVideo) else made)


@pytest.mark.parametrize(
    ("family", "make", "most"),
    [
        (flux, lambda folder: tiny_flux.weights_of(tiny_flux.make_flux(folder, "dev", single_layers=3)), 3),
        (wan, lambda folder: tiny_video.video_weights_of(tiny_video.make_wan(folder, "t2v")), 1),
        (ltx, lambda folder: tiny_video.video_weights_of(tiny_video.make_ltx(folder)), 1),
    ],
    ids=["flux", "wan", "ltx"],
)
def test_each_kind_of_block_is_compiled_once_with_the_same_output(
    family: Any, make: Any, most: int, tmp_path: Path, graphs: list[Any]
):
    """At most three times for Flux's two kinds: from the second on, a single block gets views of another stride."""
    weights = make(tmp_path / "weights")
    params = PICTURE if family is flux else CLIP
    plain = run(family, weights, params, Residency("cpu"))
    assert graphs == []
    faster = replace(weights, compiled=True)
    residency = Residency("cpu", copies_to_device=True)
    for tier in TIERS:
        assert (run(family, faster, params, residency, tier) == plain).all(), tier
        residency.evict_all()
    assert 0 < len(graphs) <= most, "wherever the weights are, and for all blocks of a kind"
    assert (run(family, weights, params, residency) == plain).all() and len(graphs) <= most


def test_compiled_code_works_for_all_sizes(tmp_path: Path, graphs: list[Any]):
    weights = tiny_flux.weights_of(tiny_flux.make_flux(tmp_path / "flux", "dev", single_layers=2))
    residency = Residency("cpu")
    for width in (96, 128, 160):
        params = PICTURE.model_copy(update={"width": width})
        plain = run(flux, weights, params, residency)
        assert (run(flux, replace(weights, compiled=True), params, residency) == plain).all()
        assert len(graphs) == 3


def test_with_a_lora_the_plain_blocks_run(tmp_path: Path, graphs: list[Any]):
    """A LoRA puts layers of its own into the blocks, for one run."""
    weights = replace(tiny_flux.weights_of(tiny_flux.make_flux(tmp_path / "flux", "dev")), compiled=True)
    worn: AppliedLora = lora(tiny_lora.make_flux_lora(tmp_path / "one.safetensors", seed=1))
    run(flux, weights, PICTURE.model_copy(update={"loras": (worn,)}), Residency("cpu"))
    assert graphs == []


def test_a_model_is_compiled_if_its_table_sets_it(tmp_path: Path):
    def load(more: str) -> Catalog:
        (tmp_path / "weights.toml").write_text(table("flux", tmp_path, more))
        return load_catalog(tmp_path / "weights.toml")

    assert load("compiled = true").find("flux").compiled
    assert not load("").find("flux").compiled
    with pytest.raises(CatalogError, match="compiled is for plain models"):
        load('compiled = true\nquantisation = "nf4"')
