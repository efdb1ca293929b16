"""What a run of Wan begins with: the caller's files as diffusers' keyword arguments, by architecture and workflow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from pipelines.base import InvalidInput
from pipelines.images import open_covering, open_flat
from pipelines.params import ExtendVideo, ImageToVideo, ReferenceToVideo, TextToVideo
from pipelines.video import first_frames, last_frames

FRAMES_PER_LATENT = 4
SIZE_MULTIPLE = 16
TRAINED_FRAMES = 81
CONTEXT_FRAMES = 17
"""What VACE sees of a video that it extends, at most: a second of motion."""
UNKNOWN = Image.new("RGB", (1, 1), (128, 128, 128))
"""Mid-grey is 0 to the VAE: what VACE was trained to see where there is nothing."""


@dataclass(frozen=True)
class Start:
    """What a run begins with: diffusers' keyword arguments, and the frames to make.

    The first `repeated` frames stand in the video `after` already. References take latents of their own.
    """

    inputs: Mapping[str, Any]
    frames: int
    repeated: int = 0
    after: Path | None = None
    reference_latents: int = 0


def from_text(params: TextToVideo) -> Start:
    return Start({}, params.num_frames)


def from_image(params: ImageToVideo) -> Start:
    """The first frame, or the first and the last."""
    pictures = [open_covering(path, size_of(params)) for path in params.images]
    return Start(dict(zip(("image", "last_image"), pictures, strict=False)), params.num_frames)


def from_last_frame(params: ExtendVideo) -> Start:
    """Image to video was trained on one frame that is known, so that is all it sees of the video."""
    frames = last_frames(params.video, size_of(params), 1, params.fps)
    return Start({"image": Image.fromarray(frames[0])}, 1 + params.num_frames, repeated=1, after=params.video)


def vace_from_image(params: ImageToVideo) -> Start:
    check_count(params.images, 1, 2)
    pictures = [open_covering(path, size_of(params)) for path in params.images]
    known = dict(zip((0, params.num_frames - 1), pictures, strict=False))
    return Start(inpainting(known, params.num_frames, size_of(params)), params.num_frames)


def vace_from_end(params: ExtendVideo) -> Start:
    """As many of the last frames as leave the length that the model was trained on: 4n + 1, at least one."""
    wanted = min(CONTEXT_FRAMES, max(1, TRAINED_FRAMES - params.num_frames))
    frames = last_frames(params.video, size_of(params), wanted, params.fps)
    frames = frames[-((len(frames) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1) :]
    count = len(frames) + params.num_frames
    known = {n: Image.fromarray(frame) for n, frame in enumerate(frames)}
    return Start(inpainting(known, count, size_of(params)), count, repeated=len(frames), after=params.video)


def vace_from_references(params: ReferenceToVideo) -> Start:
    """Pictures of what is to appear; and a video whose shapes and motion are kept, by VACE's task of colouring grey."""
    inputs: dict[str, Any] = {}
    if params.images:
        inputs["reference_images"] = [ImageOps.contain(open_flat(path), size_of(params)) for path in params.images]
    if params.video:
        frames = first_frames(params.video, size_of(params), params.num_frames, params.fps)
        greys = [ImageOps.grayscale(Image.fromarray(frame)).convert("RGB") for frame in frames]
        inputs["video"] = greys + [UNKNOWN.resize(size_of(params))] * (params.num_frames - len(greys))
    if not inputs:
        raise InvalidInput("A reference is needed: images, a video, or both.")
    return Start(inputs, params.num_frames, reference_latents=len(params.images))


def inpainting(known: Mapping[int, Image.Image], count: int, size: tuple[int, int]) -> dict[str, Any]:
    """VACE's masked video: black where a frame is known, white where one is to be made."""
    black, white, unknown = Image.new("L", size, 0), Image.new("L", size, 255), UNKNOWN.resize(size)
    return {
        "video": [known.get(n, unknown) for n in range(count)],
        "mask": [black if n in known else white for n in range(count)],
    }


RECIPES: Mapping[tuple[str, type[TextToVideo]], Callable[[Any], Start]] = {
    ("WanPipeline", TextToVideo): from_text,
    ("WanImageToVideoPipeline", ImageToVideo): from_image,
    ("WanImageToVideoPipeline", ExtendVideo): from_last_frame,
    ("WanVACEPipeline", TextToVideo): from_text,
    ("WanVACEPipeline", ImageToVideo): vace_from_image,
    ("WanVACEPipeline", ReferenceToVideo): vace_from_references,
    ("WanVACEPipeline", ExtendVideo): vace_from_end,
}


def size_of(params: TextToVideo) -> tuple[int, int]:
    return params.width, params.height


def check(params: TextToVideo) -> None:
    if params.width % SIZE_MULTIPLE or params.height % SIZE_MULTIPLE:
        raise InvalidInput(f"{params.width} x {params.height}: both must be multiples of {SIZE_MULTIPLE}.")
    added = isinstance(params, ExtendVideo)
    if (params.num_frames - (0 if added else 1)) % FRAMES_PER_LATENT:
        rule = "added frames must be a multiple of 4" if added else "frames must be a multiple of 4, and one"
        raise InvalidInput(f"{params.num_frames} frames: {rule}.")


def check_count(images: Sequence[Path], *counts: int) -> None:
    if len(images) not in counts:
        takes = " or ".join(map(str, counts))
        raise InvalidInput(f"This model takes {takes} image{'s' * (max(counts) > 1)}, not {len(images)}.")
