"""Predicted against measured peaks, by phase, tier and shape: before a shape was ever run, and once it has been.

scripts/bench memory                    tiny weights of every family
scripts/bench memory --middle           Flux with 1 GB of transformer, real VAE and tiny text encoders

Predicted are the working bytes of a phase, from `weights.toml` and earlier peaks; measured is what `PeakMeter` saw: on
CUDA what the allocator reserved, on a CPU the growth of the process. The estimates of `weights.toml` are for CUDA:
on a CPU, compare only the learned column.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.base import ExecutionMode, Peak, Weights
from pipelines.catalog.catalog import Working
from pipelines.catalog.reader import load_catalog
from pipelines.loading import quiet
from pipelines.params import TextToImage, TextToVideo
from pipelines.residency.residency import Residency
from server.scheduling.estimates import PeakEstimates, PeakMeasurement
from server.scheduling.need import Shape, need_of
from server.scheduling.placement import mode_for_worker
from server.scheduling.types import DeviceState
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import video as tiny_video
from tests.support.tiny.flux import make_flux, weights_of

TIERS = ("resident", "staged", "streamed")


@dataclass(frozen=True)
class Subject:
    """A model as installed, and params of growing shape."""

    weights: Weights
    params: tuple[Any, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--middle", action="store_true")
    given = parser.parse_args()
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    catalog = load_catalog()
    print("model      tier      shape         phase     predicted   measured      again  learned / again")
    with tempfile.TemporaryDirectory() as folder:
        for subject in middle(Path(folder)) if given.middle else small(Path(folder)):
            working = next(each.working for each in catalog.models.values() if each.family == subject.weights.family)
            for tier in TIERS:
                bench(subject, working, tier, device)


def bench(subject: Subject, working: Working, tier: Any, device: torch.device) -> None:
    """Runs each shape twice: estimates learned from the first run are compared with the second."""
    residency = Residency(device, copies_to_device=True)
    pipeline = __import__(f"pipelines.{subject.weights.family}", fromlist=["build"]).build(subject.weights, residency)
    run(pipeline, residency, subject, working, tier, subject.params[0])  # imports and the like happen once
    for params in subject.params:
        shape = shape_of(params)
        peaks = PeakEstimates(device.type)
        estimates = {each.name: each for each in need_of(subject.weights, working, shape).phases}
        first = run(pipeline, residency, subject, working, tier, params)
        for peak in first:
            peaks.add(measured(subject.weights.model, tier, shape, device, peak))
        learned = dict(peaks.estimates_for(subject.weights.model, working, shape))
        second = {peak.phase: peak for peak in run(pipeline, residency, subject, working, tier, params)}
        for peak in first:
            again, expected = second[peak.phase].working_bytes, learned[peak.phase][0][1]
            print(
                f"{subject.weights.model:10} {tier:9} {label(params):13} {peak.phase:8}"
                f" {mb(estimates[peak.phase].bytes_in(ExecutionMode(tier)))} {mb(peak.working_bytes)} {mb(again)}"
                f" {expected / max(1, again):8.2f}"
            )
    residency.clear()


def run(
    pipeline: Any, residency: Residency, subject: Subject, working: Working, tier: Any, params: Any
) -> tuple[Peak, ...]:
    need = replace(need_of(subject.weights, working, shape_of(params)), ways=(ExecutionMode(tier),))
    mode = mode_for_worker(need, DeviceState("bench", need.bytes_in(ExecutionMode(tier))))
    residency.embeddings.clear()  # every run encodes
    residency.begin_run(mode)
    pipeline.generate(params, lambda phase, step, steps: residency.enter_phase(phase))
    return residency.end_run()


def measured(model: str, tier: Any, shape: Shape, device: torch.device, peak: Peak) -> PeakMeasurement:
    sizes = peak.working_bytes, peak.allocated_bytes
    return PeakMeasurement(model, ExecutionMode(tier), peak.phase, shape.pixels, shape.frames, device.type, *sizes, 0.0)


def shape_of(params: Any) -> Shape:
    return Shape(params.width * params.height, getattr(params, "num_frames", 1))


def label(params: Any) -> str:
    frames = getattr(params, "num_frames", None)
    return f"{params.width}x{params.height}" + (f"x{frames}" if frames else "")


def mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:7.0f} MB"


def small(folder: Path) -> Iterator[Subject]:
    flux = weights_of(make_flux(folder / "flux", "dev", single_layers=6))
    yield Subject(described(flux), tuple(picture(side) for side in (128, 512)))
    for family, make in (("wan", lambda path: tiny_video.make_wan(path, "t2v")), ("ltx", tiny_video.make_ltx)):
        made = make(folder / family)
        names = ("transformer", "text_encoder", "vae")
        weights = replace(weights_of(made, names), family=family)
        yield Subject(described(weights), (clip(64, 17), clip(128, 33)))


def middle(folder: Path) -> Iterator[Subject]:
    """The VAE is the real one's size, the transformer 1 GB at full width; the text encoders stay tiny."""
    from diffusers import AutoencoderKL

    from scripts.tools.large_weights import random_module

    made = tiny_flux.make_flux(folder / "flux", "dev")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024,
    )  # fmt: skip
    torch.nn.Module.to(vae, torch.bfloat16).save_pretrained(made / "vae")
    transformer = random_module("flux-1gb")
    config = {"joint_attention_dim": tiny_flux.WIDTH, "pooled_projection_dim": tiny_flux.WIDTH}
    narrow = type(transformer)(**{**dict(transformer.config), **config})
    torch.nn.Module.to(narrow, torch.bfloat16).save_pretrained(made / "transformer", max_shard_size="50GB")
    yield Subject(described(tiny_flux.weights_of(made)), tuple(picture(side) for side in (256, 384)))


def described(weights: Weights) -> Weights:
    """The weights with the bytes of their blocks, as for an installed model."""
    from pipelines.weights.sizes import class_of_config, sizes_of

    parts = []
    for part in weights.components:
        files = sorted(part.path.glob("*.safetensors"))
        sizes = sizes_of(part.name, files, part.dtype, class_of_config(part.path))
        parts.append(replace(part, weights_bytes=sizes.weights_bytes, block_bytes=sizes.block_bytes))
    return replace(weights, components=tuple(parts))


def picture(side: int) -> TextToImage:
    return TextToImage(prompt="a cat", width=side, height=side, seed=1, num_inference_steps=2, guidance_scale=3.5)


def clip(side: int, frames: int) -> TextToVideo:
    return TextToVideo(
        prompt="a cat", width=side, height=side, seed=1, num_inference_steps=2, guidance_scale=3.0, num_frames=frames,
        fps=16, negative_prompt="",
    )  # fmt: skip


if __name__ == "__main__":
    main()
