"""fp8 storage: bytes as computed from the headers, outputs as diffusers' layerwise casting, in every tier."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from pipelines.base import Component, ExecutionMode
from pipelines.catalog.reader import load_catalog
from pipelines.flux import build
from pipelines.loading import load_component
from pipelines.params import TextToImage
from pipelines.residency.packed import ALIGNMENT_BYTES, BLOCK_ALIGNMENT_BYTES, PackedModule
from pipelines.residency.residency import Residency
from pipelines.weights.installed import Installed
from pipelines.weights.pull import pull
from pipelines.weights.sizes import FP8, class_of_config, sizes_of
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import video as tiny_video


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {
        "flux": tiny_flux.make_flux(root / "flux-dev", "dev"),
        "wan": tiny_video.make_wan(root / "wan", "t2v"),
        "ltx": tiny_video.make_ltx(root / "ltx"),
    }


def described(path: Path, dtype: str = "bfloat16", storage: str | None = None) -> Component:
    sizes = sizes_of(path.name, sorted(path.glob("*.safetensors")), dtype, class_of_config(path), storage)
    return Component(path.name, f"{path}-{storage}", sizes.weights_bytes, path, dtype, sizes.block_bytes, storage)


PARTS = [
    ("flux", "transformer"),
    ("flux", "text_encoder"),
    ("flux", "text_encoder_2"),
    ("flux", "vae"),
    ("wan", "transformer"),
    ("wan", "text_encoder"),
    ("wan", "vae"),
    ("ltx", "transformer"),
    ("ltx", "text_encoder"),
    ("ltx", "vae"),
]
STORED = [(*part, None) for part in PARTS] + [(family, part, FP8) for family, part in PARTS if part == "transformer"]
"""Only denoisers are quantised."""


@pytest.mark.parametrize(("family", "part", "storage"), STORED)
def test_bytes_computed_from_headers_are_those_of_the_loaded_tensors(
    folders: dict[str, Path], family: str, part: str, storage: str | None
):
    component = described(folders[family] / part, storage=storage)
    module = load_component(component)
    assert component.weights_bytes == sum(tensor.nbytes for tensor in module.parameters()) + sum(
        tensor.nbytes for name, tensor in module.named_buffers() if name in module.state_dict()
    )
    layout = PackedModule.of(module).layout
    if component.block_bytes:
        assert len(component.block_bytes) == len(layout.blocks)
    by_size = sorted(layout.blocks, key=lambda block: block.size_bytes)
    for computed, block in zip(sorted(component.block_bytes), by_size, strict=False):
        assert 0 <= block.size_bytes - computed < ALIGNMENT_BYTES * len(block.slots)
    slack = ALIGNMENT_BYTES * len(layout.slots) + BLOCK_ALIGNMENT_BYTES * len(layout.blocks)
    unsaved = sum(t.nbytes for name, t in module.named_buffers() if name not in module.state_dict())
    assert 0 <= layout.total_bytes - component.weights_bytes <= slack + unsaved


def picture(folder: Path, storage: str | None, tier: str = "resident", copies: bool = True) -> bytes:
    weights = tiny_flux.weights_of(folder)
    parts = tuple(
        replace(described(part.path, part.dtype, storage if part.name == "transformer" else None))
        for part in weights.components
    )
    weights = replace(weights, components=parts)
    residency = Residency("cpu", copies_to_device=copies)
    phases = (
        ("encode", (parts[1].key, parts[2].key)),
        ("denoise", (parts[0].key,)),
        ("decode", (parts[3].key,)),
    )
    chosen: Any = tier
    residency.begin_run(
        ExecutionMode(chosen, phases=phases, streamed_bytes=((parts[0].key, 0),) if tier == "streamed" else ())
    )
    params = TextToImage(prompt="a cat", width=64, height=64, seed=1, num_inference_steps=3, guidance_scale=3.5)
    return build(weights, residency).generate(params, lambda phase, step, steps: residency.enter_phase(phase)).tobytes()


@pytest.mark.parametrize("tier", ["resident", "staged", "streamed"])
def test_the_picture_of_8_bit_weights_is_the_same_in_every_tier(folders: dict[str, Path], tier: str):
    expected = picture(folders["flux"], FP8, copies=False)
    assert picture(folders["flux"], FP8, tier) == expected
    assert picture(folders["flux"], None, tier) != expected


def test_packed_8_bit_weights_give_the_outputs_of_diffusers_casting(folders: dict[str, Path]):
    path = folders["flux"] / "transformer"
    ours = load_component(described(path, storage=FP8))
    theirs = FluxTransformer2DModel.from_pretrained(path, dtype=torch.bfloat16).eval()
    theirs.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype, name
    assert ours.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    inputs = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
    with torch.inference_mode():
        assert torch.equal(ours(**inputs).sample, theirs(**inputs).sample)


def test_a_layer_that_raised_while_upcast_is_restored_wherever_its_weights_moved(folders: dict[str, Path]):
    residency = Residency("cpu", copies_to_device=True)
    component = described(folders["flux"] / "transformer", storage=FP8)
    module = residency.acquire(component, load_component)
    layer = module.transformer_blocks[0].attn.to_q
    before = layer.weight.clone().view(torch.uint8)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3, dtype=torch.bfloat16))
    residency.evict(component.key)
    residency.acquire(component, load_component)
    for _ in range(2):
        layer(torch.zeros(1, 32, dtype=torch.bfloat16))
        assert torch.equal(layer.weight.view(torch.uint8), before)


def test_a_file_of_another_dtype_takes_the_computed_bytes(folders: dict[str, Path], tmp_path: Path):
    path = tmp_path / "vae"
    torch.nn.Module.to(load_component(described(folders["flux"] / "vae")), torch.float32).save_pretrained(path)
    (tmp_path / "model_index.json").write_text((folders["flux"] / "model_index.json").read_text())
    component = described(path)
    module = load_component(component)
    assert next(module.parameters()).dtype == torch.bfloat16
    assert component.weights_bytes == sum(tensor.nbytes for tensor in module.parameters())


def test_a_quantised_model_is_a_table_beside_the_plain_one(folders: dict[str, Path], tmp_path: Path):
    table = """
[models.NAME]
name = "NAME"
kind = "image"
family = "flux"
dtype = "bfloat16"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "none"
sizes = { "1:1" = [64, 64] }
defaults = { num_inference_steps = 2 }
weights = { source = "path", path = "FOLDER" }
"""
    text = "".join(table.replace("NAME", name) for name in ("plain", "small")).replace("FOLDER", str(folders["flux"]))
    (tmp_path / "weights.toml").write_text(text + 'quantisation = "fp8-layerwise"\n')
    catalog = load_catalog(tmp_path / "weights.toml")
    for model in catalog.models.values():
        pull(model, tmp_path / "weights")
    installed = Installed(tmp_path / "weights")
    plain, small = (installed.weights(catalog.models[name]) for name in ("plain", "small"))
    assert plain and small
    shared = {part.name for part in plain.components if part.key == small.component(part.name).key}
    assert shared == {"text_encoder", "text_encoder_2", "vae"}
    before, after = plain.component("transformer").weights_bytes, small.component("transformer").weights_bytes
    assert after < 0.8 * before
