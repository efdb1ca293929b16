"""LoRAs: outputs equal diffusers', and the shared weights are unchanged afterwards."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines import flux, ltx, wan
from pipelines.base import Component, ExecutionMode, FileFingerprint, JobCancelled, UnusableWeights
from pipelines.flux import Flux
from pipelines.loading import load_component
from pipelines.params import AppliedLora, ImageToImage, TextToImage, TextToVideo
from pipelines.residency.residency import Residency
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import video as tiny_video
from tests.support.tiny.lora import make_flux_lora, make_ltx_lora, make_wan_lora

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 4
BASICS = {
    "prompt": "a red circle", "width": 64, "height": 64, "seed": 7, "num_inference_steps": 3, "guidance_scale": 3.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    for kind in ("dev", "schnell"):
        tiny_flux.make_flux(root / f"flux-{kind}", kind, single_layers=LAYERS)
    tiny_video.make_wan(root / "t2v", "t2v")
    make_flux_lora(root / "one.safetensors", seed=1, single_layers=LAYERS)
    make_flux_lora(root / "two.safetensors", seed=2, rank=4, single_layers=LAYERS)
    tiny_video.make_ltx(root / "ltx")
    make_wan_lora(root / "t2v.safetensors", seed=3)
    make_ltx_lora(root / "ltx.safetensors", seed=4)
    return root


@pytest.fixture(params=[False, True], ids=["host is device", "host copies to device"])
def residency(request: pytest.FixtureRequest) -> Residency:
    return Residency("cpu", copies_to_device=request.param)


@pytest.fixture
def build(root: Path, residency: Residency) -> Callable[[str], Flux]:
    return lambda model: flux.build(tiny_flux.weights_of(root / model), residency)


def lora(path: Path, scale: float = 1.0) -> AppliedLora:
    stamp = FileFingerprint.of(path)
    assert stamp
    component = Component("network", path.name, stamp.size_bytes, path, "bfloat16", fingerprints=(stamp,))
    return AppliedLora(id=path.stem, scale=scale, weights=component)


def params(*loras: AppliedLora, **changes: Any) -> TextToImage:
    return TextToImage(**BASICS | changes, loras=loras)


def ignore(phase: str, step: int, steps: int) -> None: ...


def bits(picture: Image.Image) -> bytes:
    return picture.tobytes()


def own(folder: Path, loras: dict[Path, float]) -> Image.Image:
    """The output of diffusers' pipeline, which loads everything itself."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(action="ignore"):  # that there are several
        for path in loras:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
    pipe.set_adapters([path.stem for path in loras], list(loras.values()))
    inputs = {name: value for name, value in BASICS.items() if name != "seed"}
    return pipe(**inputs, generator=torch.Generator("cpu").manual_seed(7)).images[0]


# Output


@pytest.mark.parametrize("scales", [(1.0,), (-0.5,), (0.8, 0.6)])
def test_a_picture_equals_diffusers(build, root: Path, scales: tuple[float, ...]):
    paths = dict(zip((root / "one.safetensors", root / "two.safetensors"), scales, strict=False))
    ours = build("flux-dev").generate(params(*(lora(path, scale) for path, scale in paths.items())), ignore)
    assert bits(ours) == bits(own(root / "flux-dev", paths))


def test_image_to_image_applies_them_too(build, root: Path, tmp_path: Path):
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "in.png")
    dev = build("flux-dev")
    plain, applied = (
        dev.generate(ImageToImage(**BASICS, images=(tmp_path / "in.png",), strength=0.7, loras=loras), ignore)
        for loras in ((), (lora(root / "one.safetensors"),))
    )
    assert bits(plain) != bits(applied)


def test_each_lora_and_each_scale_makes_another_picture(build, root: Path):
    dev, one, two = build("flux-dev"), root / "one.safetensors", root / "two.safetensors"
    wardrobes = [[], [lora(one)], [lora(two)], [lora(one, 0.5)], [lora(one), lora(two)]]
    assert len({bits(dev.generate(params(*applied), ignore)) for applied in wardrobes}) == len(wardrobes)


def test_scale_0_equals_no_lora_bit_for_bit(build, root: Path):
    dev, one, two = build("flux-dev"), root / "one.safetensors", root / "two.safetensors"
    assert bits(dev.generate(params(lora(one, 0)), ignore)) == bits(dev.generate(params(), ignore))
    with_two = bits(dev.generate(params(lora(two)), ignore))
    assert bits(dev.generate(params(lora(one, 0), lora(two)), ignore)) == with_two


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize(("family", "folder"), [(wan, "t2v"), (ltx, "ltx")])
def test_videos_apply_them_too(root: Path, residency: Residency, family: Any, folder: str):
    model = family.build(tiny_video.video_weights_of(root / folder), residency)
    clip = {
        "prompt": "a red circle", "width": 64, "height": 64, "num_frames": 9, "fps": 16, "seed": 7,
        "num_inference_steps": 2, "guidance_scale": 1.0,
    }  # fmt: skip
    plain, applied, again = (
        model.generate(TextToVideo(**clip, loras=loras), ignore).frames
        for loras in ((), (lora(root / f"{folder}.safetensors"),), ())
    )
    assert not np.array_equal(plain, applied)
    assert np.array_equal(plain, again)


# State after a run


def trace(network: torch.nn.Module) -> list[Any]:
    """Every layer, tensor, address and hook of a network."""
    modules = [(name, id(module), module.training) for name, module in network.named_modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules()]
    tensors = [
        (name, id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in network.named_parameters()
    ]
    return [modules, hooks, tensors, list(network.state_dict()), hasattr(network, "peft_config")]


def held(root: Path, residency: Residency, model: str = "flux-dev") -> torch.nn.Module:
    return residency.acquire(tiny_flux.weights_of(root / model).component("transformer"), load_component)


def stop(phase: str, step: int, steps: int) -> None:
    if (phase, step) == ("denoise", 2):
        raise JobCancelled


def test_the_shared_weights_are_neither_changed_nor_moved(build, root: Path, residency: Residency):
    dev = build("flux-dev")
    plain = bits(dev.generate(params(), ignore))
    before = trace(held(root, residency))
    bytes_before = [tensor.clone() for tensor in held(root, residency).parameters()]
    dev.generate(params(lora(root / "one.safetensors"), lora(root / "two.safetensors")), ignore)
    assert trace(held(root, residency)) == before
    assert all(map(torch.equal, held(root, residency).parameters(), bytes_before))
    assert bits(dev.generate(params(), ignore)) == plain


def test_a_cancelled_run_leaves_nothing_behind(build, root: Path, residency: Residency):
    dev = build("flux-dev")
    plain = bits(dev.generate(params(), ignore))
    before = trace(held(root, residency))
    with pytest.raises(JobCancelled):
        dev.generate(params(lora(root / "one.safetensors")), stop)
    assert trace(held(root, residency)) == before
    assert bits(dev.generate(params(), ignore)) == plain


def test_weights_that_were_evicted_and_reloaded_take_the_next_lora(build, root: Path, residency: Residency):
    dev = build("flux-dev")
    first = bits(dev.generate(params(lora(root / "one.safetensors")), ignore))
    residency.evict_all()
    assert bits(dev.generate(params(lora(root / "one.safetensors")), ignore)) == first


def test_models_that_share_components_are_not_affected(build, root: Path):
    plain = bits(build("flux-schnell").generate(params(), ignore))
    build("flux-dev").generate(params(lora(root / "one.safetensors")), ignore)
    assert bits(build("flux-schnell").generate(params(), ignore)) == plain


@pytest.mark.parametrize("tier", ["staged", "streamed"])
def test_every_tier_makes_the_same_picture(root: Path, tier: Any):
    """In the tier `streamed`, a LoRA stays on the device while its layers are copied in."""
    weights = tiny_flux.weights_of(root / "flux-dev")
    applied = params(lora(root / "one.safetensors"), lora(root / "two.safetensors", 0.5))
    resident = bits(flux.build(weights, Residency("cpu", copies_to_device=True)).generate(applied, ignore))
    keys = {component.name: component.key for component in weights.components}
    phases = (
        ("encode", (keys["text_encoder"], keys["text_encoder_2"])),
        ("denoise", (keys["transformer"],)),
        ("decode", (keys["vae"],)),
    )
    residency = Residency("cpu", copies_to_device=True)
    mode = ExecutionMode(tier, phases=phases, streamed_bytes=((keys["transformer"], 0),) if tier == "streamed" else ())
    dev = flux.build(weights, residency)
    for _ in range(2):
        residency.begin_run(mode)
        assert bits(dev.generate(applied, ignore)) == resident


# Errors


def changed(root: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    save_file(change(load_file(root / "one.safetensors")), path)
    return path


def key_of(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def with_encoder(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    return tensors | {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)}


def too_wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Like a control LoRA, for which diffusers would widen the shared layer."""
    return tensors | {"transformer.x_embedder.lora_A.weight": torch.ones(2, 128)}


def of_another_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("transformer_blocks.0", "transformer_blocks.77"): value for name, value in tensors.items()}


def lokr(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"transformer.x_embedder.lokr_w1": torch.ones(2, 2), "transformer.x_embedder.lokr_w2": torch.ones(16, 32)}


def dora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"transformer.x_embedder.dora_scale": torch.ones(32)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_encoder, "text_encoder.*denoiser alone"),
        (too_wide, r"\(2, 128\).*x_embedder"),
        (of_another_model, "transformer_blocks"),
        (lokr, "not part of a plain LoRA"),
        (dora, "dora_scale is not part of a plain LoRA"),
        (lambda tensors: {"other": torch.ones(2)}, "other"),
    ],
)
def test_a_file_that_is_not_a_lora_for_this_denoiser_is_refused(
    build, root: Path, tmp_path: Path, residency, change, why: str
):
    dev = build("flux-dev")
    plain = bits(dev.generate(params(), ignore))
    before = trace(held(root, residency))
    bad = changed(root, tmp_path / "bad.safetensors", change)
    with pytest.raises(UnusableWeights, match=f"LoRA bad does not fit this model: .*{why}"):
        dev.generate(params(lora(root / "one.safetensors"), lora(bad)), ignore)
    assert trace(held(root, residency)) == before
    assert bits(dev.generate(params(), ignore)) == plain


def test_a_file_that_is_cut_short_or_was_replaced_is_refused(build, root: Path, tmp_path: Path):
    short = tmp_path / "short.safetensors"
    short.write_bytes((root / "one.safetensors").read_bytes()[:-10])
    applied = lora(short)
    with pytest.raises(UnusableWeights, match="LoRA short"):
        build("flux-dev").generate(params(applied), ignore)
    short.write_bytes((root / "one.safetensors").read_bytes())
    with pytest.raises(UnusableWeights, match="replaced"):
        build("flux-dev").generate(params(applied), ignore)
    gone = (
        applied.model_copy(update={"weights": replace(applied.weights, fingerprints=())})
        if applied.weights
        else applied
    )
    short.unlink()
    with pytest.raises(UnusableWeights, match="LoRA short"):
        build("flux-dev").generate(params(gone), ignore)
