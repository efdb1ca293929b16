"""From what a caller sent to a video's size, rate and number of frames. Pure, and nothing is corrected in silence.

A length between two that a model can make becomes the nearer one; the answer's `duration` tells which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol

from pipelines.catalog import Frames, Model
from server.errors import InvalidBody, UnsupportedAspectRatio, UnsupportedResolution
from server.remote.errors import UnsupportedDuration

NEAR = 0.03
"""An input whose shape is so near to a listed one is taken for it, and cropped by as much."""
NARROWEST, WIDEST = 1 / 4, 4 / 1


class Picture(Protocol):
    """An input image or video, as far as it counts here: upright, in pixels."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


@dataclass(frozen=True)
class Footage:
    """An input video, as it is stored."""

    name: str
    width: int
    height: int
    fps: float
    duration_s: float


def video_fields(
    model: Model, workflow: str, given: Mapping[str, Any], images: Sequence[Picture], video: Footage | None
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
    width, height = size_of(model, sizes, given.get("aspect_ratio"), pictures[0] if pictures else None)
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


def size_of(
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
    aspect = min(max(shape.width / shape.height, NARROWEST), WIDEST)
    nearest = min(sizes.values(), key=lambda size: abs(size[0] / size[1] / aspect - 1))
    if abs(nearest[0] / nearest[1] / aspect - 1) <= NEAR:
        return nearest
    area = first[0] * first[1]
    return rounded(sqrt(area * aspect), model.size_multiple), rounded(sqrt(area / aspect), model.size_multiple)


def rate_of(model: Model, frames: Frames, asked: int | None, extended: Footage | None) -> int:
    """The caller's; else for extending the one nearest to the video's; else the model's usual one."""
    if asked is None and extended:
        return min(frames.fps, key=lambda rate: abs(rate - extended.fps))
    fps = int(asked or model.defaults.get("fps", frames.fps[0]))
    if fps not in frames.fps:
        message = f"{model.name} makes {listed(frames.fps)} frames a second, not {fps}"
        raise invalid("fps", message, frameRates=list(frames.fps))
    return fps


def length_of(model: Model, asked: float | None, reference: Footage | None) -> float:
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
        issues = [{"path": "duration", "message": message}]
        raise UnsupportedDuration(f"duration: {message}", issues=issues, durations=durations)
    return count


def invalid(field: str, message: str, **there_is: Any) -> InvalidBody:
    return InvalidBody(f"{field}: {message}", issues=[{"path": field, "message": message}], **there_is)


def listed(values: Sequence[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def rounded(length: float, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)
