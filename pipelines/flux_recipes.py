"""How each architecture of Flux runs each kind of params: the pipeline, the picture it begins with, what is special."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from PIL import Image

from pipelines.base import InvalidInput, UnusableWeights, Weights
from pipelines.images import open_covering, open_flat
from pipelines.loading import architecture_of
from pipelines.params import ImageToImage, TextToImage

REFERENCE_AREA = 1024**2
"""Pixels of a Kontext reference: it was trained on sizes of a megapixel, in multiples of 16 (diffusers lists them)."""


@dataclass(frozen=True)
class Recipe:
    """How one architecture runs one kind of params. `picture` is told of what sides must be multiples."""

    pipeline: Any
    picture: Callable[[Any, int], Image.Image | None]
    special: Callable[[Any], dict[str, Any]]


def no_picture(params: TextToImage, multiple: int) -> None:
    return None


def start_picture(params: ImageToImage, multiple: int) -> Image.Image:
    """The one input, covering the output's size: scaled by Lanczos, its overhang cropped evenly."""
    if len(params.images) != 1:
        raise InvalidInput(f"This model takes one image, not {len(params.images)}.")
    return open_covering(params.images[0], (params.width, params.height))


def reference_picture(params: ImageToImage, multiple: int) -> Image.Image:
    """What Kontext looks at: the inputs as one picture, side by side at one height, none cropped.

    Kontext takes one picture; such a row is how ComfyUI's ImageStitch shows it several. Its area is the one that
    Kontext was trained on, or the output's where that is less; its shape is its own, but for the
    rounding to `multiple` pixels.
    """
    if not params.images:
        raise InvalidInput("Editing needs at least one image.")
    pictures = [open_flat(path) for path in params.images]
    ratios = [picture.width / picture.height for picture in pictures]
    area = min(params.width * params.height, REFERENCE_AREA)
    width, height = (to_multiple(side, multiple) for side in (sqrt(area * sum(ratios)), sqrt(area / sum(ratios))))
    row = Image.new("RGB", (width, height))
    for i, picture in enumerate(pictures):
        left, right = (round(row.width * sum(ratios[:n]) / sum(ratios)) for n in (i, i + 1))
        row.paste(picture.resize((max(1, right - left), row.height), Image.Resampling.LANCZOS), (left, 0))
    return row


def to_multiple(length: float, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)


def nothing(params: TextToImage) -> dict[str, Any]:
    return {}


def strength(params: ImageToImage) -> dict[str, Any]:
    """diffusers runs the last ceil(steps x strength) steps; with 0 there is none, and the input is the output."""
    return {"strength": params.strength}


def whole_area(params: TextToImage) -> dict[str, Any]:
    """Kontext rescales its output to `max_area`: the size asked for stays as it is."""
    return {"max_area": params.width * params.height}


RECIPES: dict[tuple[str, type[TextToImage]], Recipe] = {
    ("FluxPipeline", TextToImage): Recipe(FluxPipeline, no_picture, nothing),
    ("FluxPipeline", ImageToImage): Recipe(FluxImg2ImgPipeline, start_picture, strength),
    ("FluxKontextPipeline", TextToImage): Recipe(FluxKontextPipeline, no_picture, whole_area),
    ("FluxKontextPipeline", ImageToImage): Recipe(FluxKontextPipeline, reference_picture, whole_area),
}
"""By architecture and the kind of params."""


def recipes_for(weights: Weights) -> dict[type[TextToImage], Recipe]:
    """The recipes of the weights' architecture, by the kind of params."""
    name = architecture_of(weights)
    recipes = {kind: recipe for (architecture, kind), recipe in RECIPES.items() if architecture == name}
    if not recipes:
        raise UnusableWeights(f"{weights.folder / 'model_index.json'}: {name} is not a Flux pipeline known here")
    return recipes
