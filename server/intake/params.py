"""Resolves a request into a pipeline's params: workflow, size, frames, seed. Pure.

Invalid input is refused, not corrected.
A video length between two that a model can make becomes the nearer one; the output's `duration` says which.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Protocol

from pydantic.alias_generators import to_camel

from pipelines.base import round_to_multiple
from pipelines.catalog.catalog import Catalog, Frames, Model
from pipelines.media.images import MAX_SIDES
from pipelines.params import MAX_SEED, PARAMS, Body, Params, TextToImage, TextToVideo
from server.errors import (
    UnsupportedAspectRatio,
    UnsupportedDuration,
    UnsupportedResolution,
    UnsupportedWorkflow,
    invalid_field,
)
from server.files.inputs import StoredImage

NEAR = 0.03
"""An input whose shape is so near to a listed one is taken for it, and cropped by as much."""
MIN_ASPECT, MAX_ASPECT = 1 / 4, 4 / 1


class Picture(Protocol):
    """An input image or video, as far as it counts here: upright, in pixels."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


@dataclass(frozen=True)
class InputVideo:
    """An input video, as it is stored."""

    name: str
    width: int
    height: int
    fps: float
    duration_s: float


def video_fields(
    model: Model, workflow: str, given: Mapping[str, Any], images: Sequence[Picture], video: InputVideo | None
) -> dict[str, Any]:
    """`width`, `height`, `fps` and `num_frames` for the params; and `duration` and `resolution`, for the price.

    `given` is what the caller sent. Raises UnsupportedResolution, UnsupportedAspectRatio, UnsupportedDuration or, for a
    frame rate, InvalidBody, naming what there is.
    """
    if model.frames is None:
        raise ValueError(f"{model.id} has no frames in weights.toml")
    resolution = given.get("resolution", model.defaults.get("resolution"))
    pictures = images if workflow == "image-to-video" else [video] if video else []
    sizes = sizes_of(model, resolution)
    width, height = video_size(model, sizes, given.get("aspect_ratio"), pictures[0] if pictures else None)
    fps = rate_of(model, model.frames, given.get("fps"), video if workflow == "extend" else None)
    duration = length_of(model, given.get("duration"), video if workflow == "reference-to-video" else None)
    return {
        "width": width,
        "height": height,
        "fps": fps,
        "num_frames": count_of(model, model.frames, 0 if workflow == "extend" else 1, duration, fps),
        "duration": duration,
        "resolution": resolution,
    }


def sizes_of(model: Model, resolution: str | None) -> Mapping[str, tuple[int, int]]:
    """By aspect ratio."""
    if not model.resolutions and resolution is None:
        return model.sizes
    if resolution is None or resolution not in model.resolutions:
        raise UnsupportedResolution(
            f"{model.name} has no resolution {resolution}; it has {', '.join(model.resolutions) or 'one only'}.",
            resolution=resolution,
            resolutions=list(model.resolutions),
        )
    return model.resolutions[resolution]


def video_size(
    model: Model, sizes: Mapping[str, tuple[int, int]], ratio: str | None, shape: Picture | None
) -> tuple[int, int]:
    """(width, height): the one listed for the ratio; else the input's shape, at the area of those listed."""
    if ratio and ratio not in sizes:
        raise UnsupportedAspectRatio(
            f"{model.name} has no aspect ratio {ratio}; it has {', '.join(sizes)}.",
            aspectRatio=ratio,
            aspectRatios=list(sizes),
        )
    first = next(iter(sizes.values()))
    if ratio or shape is None:
        return sizes[ratio] if ratio else first
    aspect = min(max(shape.width / shape.height, MIN_ASPECT), MAX_ASPECT)
    nearest = min(sizes.values(), key=lambda size: abs(size[0] / size[1] / aspect - 1))
    if abs(nearest[0] / nearest[1] / aspect - 1) <= NEAR:
        return nearest
    area = first[0] * first[1]
    width, height = (
        round_to_multiple(side, model.size_multiple) for side in (sqrt(area * aspect), sqrt(area / aspect))
    )
    return width, height


def rate_of(model: Model, frames: Frames, asked: int | None, extended: InputVideo | None) -> int:
    """The caller's; else for extending the one nearest to the video's; else the model's usual one."""
    if asked is None and extended:
        return min(frames.fps, key=lambda rate: abs(rate - extended.fps))
    fps = int(asked or model.defaults.get("fps", frames.fps[0]))
    if fps not in frames.fps:
        message = f"{model.name} makes {listed(frames.fps)} frames a second, not {fps}"
        raise invalid_field("fps", message, frameRates=list(frames.fps))
    return fps


def length_of(model: Model, asked: float | None, reference: InputVideo | None) -> float:
    """In seconds: the caller's; else the usual, or as much of it as there is of a reference video."""
    usual = float(model.defaults["duration"])
    return asked or (min(usual, reference.duration_s) if reference else usual)


def count_of(model: Model, frames: Frames, first: int, duration: float, fps: int) -> int:
    """The number of frames nearest to `duration` seconds: `first` and n x step.

    `first` is 1, or 0 for the frames that extending adds to the one that is there.
    """
    there_are = range(first + frames.step, first + frames.max, frames.step)
    count = first + round((duration * fps - first) / frames.step) * frames.step
    if count not in there_are:
        durations = [round(each / fps, 3) for each in there_are]
        message = f"{model.name} makes {durations[0]:.2g} to {durations[-1]:.3g} seconds, not {duration:g}"
        raise invalid_field("duration", message, cls=UnsupportedDuration, durations=durations)
    return count


def listed(values: Sequence[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


OPTIONAL_PARAMS = frozenset({"num_inference_steps", "guidance_scale", "strength", "negative_prompt"})
"""Fields that a model takes exactly if `weights.toml` gives it a default for them."""

IMAGE = {"image_url": "an image"}
REQUIRED_INPUTS: Mapping[str, Mapping[str, str]] = {
    "image-to-image": IMAGE, "style-transfer": IMAGE, "image-to-video": IMAGE, "reference-to-video": IMAGE,
    "extend": {"video_url": "a video"}, "lip-sync": {"video_url": "a video", "audio_url": "a voice"},
}  # fmt: skip
"""The input files that a workflow cannot do without. A reference may also be a video."""

MIN_ASPECT, MAX_ASPECT = 1 / 4, 4 / 1
"""Width over height of what is generated from an input image of any shape."""


@dataclass(frozen=True)
class Resolved:
    """Complete params; `ignored` are the fields, as sent, that had no effect.

    `pixels` is what the output has, of a video one frame. `priced` is what else a video's price depends on.
    """

    params: Params
    pixels: int
    ignored: frozenset[str]
    priced: Mapping[str, Any] = field(default_factory=dict)


def input_urls(body: Body) -> list[str]:
    """The input images' URLs, `imageUrl` first."""
    given = body.given
    return [*([given["image_url"]] if "image_url" in given else []), *given.get("image_urls", [])]


def workflow_of(model: Model, body: Body, catalog: Catalog) -> str:
    """What is asked of the model: as said, or as the fields say. Raises UnsupportedWorkflow, naming who can."""
    asked = body.given.get("workflow") or _infer_workflow(model.kind, body)
    if asked not in model.workflows:
        can = [each.id for each in catalog.that_can(model.kind, asked)]
        who = f" These can: {', '.join(can)}." if can else ""
        raise UnsupportedWorkflow(
            f"{model.name} cannot do {asked}; it does {', '.join(model.workflows)}.{who}",
            model=model.id,
            workflow=asked,
            workflows=list(model.workflows),
            models=can,
        )
    _check_inputs(asked, body)
    return asked


def resolve(
    model: Model, workflow: str, body: Body, images: Sequence[StoredImage], video: InputVideo | None = None
) -> Resolved:
    """Fill in what was left open, from `weights.toml` and the input's shape. Raises UnsupportedAspectRatio.

    For videos also UnsupportedResolution, and InvalidBody for a length or frame rate that there is not.
    """
    cls = PARAMS[workflow]
    offered = {
        name: value for name, value in body.given.items() if name not in OPTIONAL_PARAMS or name in model.defaults
    }
    offered = {**model.defaults, **offered, "images": [image.name for image in images]}
    if "loras" in offered:
        offered["loras"] = [lora.model_dump() for lora in offered["loras"]]
    priced = {}
    if issubclass(cls, TextToVideo):
        fields = video_fields(model, workflow, body.given, [image.info for image in images], video)
        priced = {"duration": fields["duration"], "resolution": fields["resolution"]}
        offered = {"seed": secrets.randbelow(MAX_SEED + 1), **offered, **fields}
        offered |= {"video": video.name} if video else {}
        pixels = fields["width"] * fields["height"]
    elif issubclass(cls, TextToImage):
        width, height = image_size(model, offered.get("aspect_ratio"), images)
        offered = {"seed": secrets.randbelow(MAX_SEED + 1), **offered, "width": width, "height": height}
        pixels = width * height
    else:
        offered["image"] = images[0].name
        width, height = (side * int(offered.get("scale", 1)) for side in (images[0].info.width, images[0].info.height))
        _check_sides(max(width, height), offered.get("output_format", "png"))
        pixels = width * height
    taken = {name: offered[name] for name in cls.model_fields if name in offered}
    return Resolved(cls.model_validate(taken), pixels, ignored(body, taken), priced)


def image_size(model: Model, aspect_ratio: str | None, images: Sequence[StoredImage]) -> tuple[int, int]:
    """(width, height): the one listed for the ratio; else the first image's shape at the model's area; else square."""
    if aspect_ratio and aspect_ratio not in model.sizes:
        raise UnsupportedAspectRatio(
            f"{model.name} has no aspect ratio {aspect_ratio}; it has {', '.join(model.sizes)}.",
            aspectRatio=aspect_ratio,
            aspectRatios=list(model.sizes),
        )
    if aspect_ratio or not images:
        return model.sizes[aspect_ratio or "1:1"]
    return _same_shape(images[0], math.prod(model.sizes["1:1"]), model.size_multiple)


def ignored(body: Body, taken: Mapping[str, Any]) -> frozenset[str]:
    """Fields, as they were sent, that nothing came of: unknown ones, and those that the model or workflow has not."""
    used = {*taken, "model", "workflow"}
    used |= {"image_url", "image_urls"} if {"image", "images"} & taken.keys() else set()
    used |= {"video_url"} if "video" in taken else set()
    used |= {"aspect_ratio"} if "width" in taken else set()
    used |= {"duration", "resolution"} if "num_frames" in taken else set()
    fields = type(body).model_fields
    unused = {fields[name].alias or name for name in body.given if name not in used}
    return body.unknown | unused


def _check_sides(longest: int, output_format: str) -> None:
    """Before it is charged: what would be made must go into the file that is asked for."""
    if longest > MAX_SIDES[output_format]:
        message = f"a {output_format} file holds at most {MAX_SIDES[output_format]:,} pixels a side; use png"
        raise invalid_field("outputFormat", message)


def _check_inputs(workflow: str, body: Body) -> None:
    """Raises InvalidBody for a workflow that lacks what it works on."""
    given = {*body.given} | ({"image_url"} if input_urls(body) else set())
    for name, noun in REQUIRED_INPUTS.get(workflow, {}).items():
        if name not in given and not (workflow == "reference-to-video" and "video_url" in given):
            raise invalid_field(to_camel(name), f"{workflow} needs {noun}")


def _infer_workflow(kind: str, body: Body) -> str:
    if kind in {"upscale", "remove-bg"}:
        return kind
    if "video_url" in body.given:
        return "lip-sync" if "audio_url" in body.given else "extend"
    return f"{'image' if input_urls(body) else 'text'}-to-{kind}"


def _same_shape(image: StoredImage, area: int, multiple: int) -> tuple[int, int]:
    aspect = min(max(image.info.width / image.info.height, MIN_ASPECT), MAX_ASPECT)
    return round_to_multiple(math.sqrt(area * aspect), multiple), round_to_multiple(math.sqrt(area / aspect), multiple)
