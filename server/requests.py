"""From what a caller sent to what a pipeline runs: workflow, size, seed. Pure, and nothing is corrected in silence."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.alias_generators import to_camel

from pipelines.catalog import Catalog, Model
from pipelines.images import MAX_SIDES
from pipelines.params import MAX_SEED, PARAMS, Body, Params, TextToImage, TextToVideo
from server.errors import InvalidBody, UnsupportedAspectRatio, UnsupportedWorkflow
from server.media import StoredImage
from server.video_requests import Footage, video_fields

TUNABLES = frozenset({"num_inference_steps", "guidance_scale", "strength", "negative_prompt"})
"""Fields that a model takes exactly if `weights.toml` gives it a default for them."""

IMAGE = {"image_url": "an image"}
NEEDS: Mapping[str, Mapping[str, str]] = {
    "image-to-image": IMAGE, "style-transfer": IMAGE, "image-to-video": IMAGE, "reference-to-video": IMAGE,
    "extend": {"video_url": "a video"}, "lip-sync": {"video_url": "a video", "audio_url": "a voice"},
}  # fmt: skip
"""The input files that a workflow cannot do without. A reference may also be a video."""

NARROWEST, WIDEST = 1 / 4, 4 / 1
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
    asked = body.given.get("workflow") or _implied(model.kind, body)
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
    model: Model, workflow: str, body: Body, images: Sequence[StoredImage], video: Footage | None = None
) -> Resolved:
    """Fill in what was left open, from `weights.toml` and the input's shape. Raises UnsupportedAspectRatio.

    For videos also UnsupportedResolution, and InvalidBody for a length or frame rate that there is not.
    """
    cls = PARAMS[workflow]
    offered = {name: value for name, value in body.given.items() if name not in TUNABLES or name in model.defaults}
    offered = {**model.defaults, **offered, "images": [image.name for image in images]}
    if "loras" in offered:
        offered["loras"] = [lora.model_dump() for lora in offered["loras"]]
    priced = {}
    if issubclass(cls, TextToVideo):
        fields = video_fields(model, workflow, body.given, images, video)
        priced = {"duration": fields["duration"], "resolution": fields["resolution"]}
        offered = {"seed": secrets.randbelow(MAX_SEED + 1), **offered, **fields}
        offered |= {"video": video.name} if video else {}
        pixels = fields["width"] * fields["height"]
    elif issubclass(cls, TextToImage):
        width, height = size_of(model, offered.get("aspect_ratio"), images)
        offered = {"seed": secrets.randbelow(MAX_SEED + 1), **offered, "width": width, "height": height}
        pixels = width * height
    else:
        offered["image"] = images[0].name
        width, height = (side * int(offered.get("scale", 1)) for side in (images[0].width, images[0].height))
        _check_sides(max(width, height), offered.get("output_format", "png"))
        pixels = width * height
    taken = {name: offered[name] for name in cls.model_fields if name in offered}
    return Resolved(cls.model_validate(taken), pixels, ignored(body, taken), priced)


def size_of(model: Model, aspect_ratio: str | None, images: Sequence[StoredImage]) -> tuple[int, int]:
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
        raise InvalidBody(f"outputFormat: {message}", issues=[{"path": "outputFormat", "message": message}])


def _check_inputs(workflow: str, body: Body) -> None:
    """Raises InvalidBody for a workflow that lacks what it works on."""
    given = {*body.given} | ({"image_url"} if input_urls(body) else set())
    for name, noun in NEEDS.get(workflow, {}).items():
        if name not in given and not (workflow == "reference-to-video" and "video_url" in given):
            missing = {"path": to_camel(name), "message": f"{workflow} needs {noun}"}
            raise InvalidBody(f"{missing['path']}: {missing['message']}", issues=[missing])


def _implied(kind: str, body: Body) -> str:
    if kind in {"upscale", "remove-bg"}:
        return kind
    if "video_url" in body.given:
        return "lip-sync" if "audio_url" in body.given else "extend"
    return f"{'image' if input_urls(body) else 'text'}-to-{kind}"


def _same_shape(image: StoredImage, area: int, multiple: int) -> tuple[int, int]:
    aspect = min(max(image.width / image.height, NARROWEST), WIDEST)
    return _rounded(math.sqrt(area * aspect), multiple), _rounded(math.sqrt(area / aspect), multiple)


def _rounded(length: float, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)
