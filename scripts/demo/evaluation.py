"""What every score needs: a demo model in the server's own pipelines, pictures to begin with, and a tally of claims."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.base import ExecutionMode
from pipelines.catalog.reader import load_catalog
from pipelines.params import ExtendVideo, ImageToImage, TextToImage, TextToVideo
from pipelines.residency.residency import Residency
from pipelines.weights.installed import Installed

PROMPTS = 200
KEPT = 0.08
"""How far a shape that should stay may be off, in shares of the shorter side."""


class Tally:
    """Of each claim, how often it was checked and how often it held."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.held: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()

    def add(self, claim: str, held: bool) -> None:
        self.checked[claim] += 1
        self.held[claim] += held

    def lines(self) -> Iterable[str]:
        for claim, count in self.checked.items():
            share = 100 * self.held[claim] / count
            yield f"{self.title:<36} {claim:<28} {share:6.1f} %   {self.held[claim]} of {count}"


class Demo:
    """A model's demo weights in the pipeline that the server runs them in, with the demo's own defaults."""

    def __init__(self, name: str, residency: Residency) -> None:
        model = load_catalog().find(name).demo
        weights = Installed(Path(tempfile.mkdtemp())).weights(model) if model else None
        if model is None or weights is None:
            raise SystemExit(f"{name} has no demo weights")
        self.model, self.weights, self.residency = model, weights, residency
        self.pipeline = family(weights.family).build(weights, residency)

    def run(self, params: Any) -> Any:
        self.residency.begin_run(ExecutionMode())
        return self.pipeline.generate(params, lambda phase, step, steps: self.residency.enter_phase(phase))

    def image(self, prompt: str, seed: int, size: tuple[int, int] = (256, 256), **more: Any) -> np.ndarray:
        values = {"num_inference_steps": self.model.defaults["num_inference_steps"]} | more
        kind = ImageToImage if "images" in more else TextToImage
        return np.asarray(self.run(kind(prompt=prompt, width=size[0], height=size[1], seed=seed, **values)))

    def clip(self, prompt: str, seed: int, kind: Any = TextToVideo, **more: Any) -> np.ndarray:
        """(frames, height, width, 3); two seconds of the usual size."""
        frames = self.model.frames
        assert frames is not None
        width, height = self.model.sizes["1:1"]
        fps = self.model.defaults["fps"]
        count = round(2 * fps / frames.step) * frames.step
        usual = {name: self.model.defaults[name] for name in ("num_inference_steps", "guidance_scale")}
        values = {"fps": fps, "num_frames": count + (0 if kind is ExtendVideo else 1)} | usual | more
        return self.run(kind(prompt=prompt, width=width, height=height, seed=seed, **values)).frames


def family(name: str) -> Any:
    return import_module(f"pipelines.{name}")


def picture_of(drawn: torch.Tensor) -> Image.Image:
    """Of (3, height, width), from -1 to 1."""
    return Image.fromarray(((drawn.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


@contextmanager
def saved(picture: Image.Image) -> Iterator[Path]:
    """A picture in a file for as long as the block lasts."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        picture.save(file.name)
        yield Path(file.name)
