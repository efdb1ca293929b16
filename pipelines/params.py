"""Parameters, written once: the fields, the bodies that callers send, and the params that pipelines run."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.alias_generators import to_camel

from pipelines.base import Component

MAX_SEED = 2**32 - 1

Workflow = Literal[
    "text-to-image", "image-to-image", "style-transfer", "upscale", "remove-bg",
    "text-to-video", "image-to-video", "reference-to-video", "extend", "lip-sync",
]  # fmt: skip

Prompt = Annotated[str, Field(min_length=1, max_length=8_000, pattern=r"\S", description="What to make.")]
NegativePrompt = Annotated[str, Field(max_length=8_000, description="What to keep out.")]
ModelName = Annotated[str, Field(min_length=1, max_length=100, description="A model's id or alias.")]
Url = Annotated[
    str, Field(min_length=1, description="An `https:`, `http:` or `data:` URL, or one of this server's own file URLs.")
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="The same seed gives the same output on one device.")]
Strength = Annotated[float, Field(ge=0, le=1, description="0 keeps the input image, 1 ignores it.")]
Steps = Annotated[int, Field(ge=1, le=100, description="Denoising steps.")]
GuidanceScale = Annotated[float, Field(ge=0, le=30, description="How closely to follow the prompt.")]
Scale = Annotated[Literal[2, 4], Field(description="How many times wider and higher.")]
AspectRatio = Annotated[str, Field(pattern=r"^\d{1,2}:\d{1,2}$", description="Width to height, such as `16:9`.")]
Duration = Annotated[float, Field(gt=0, le=60, description="Length in seconds.")]
Resolution = Annotated[str, Field(max_length=20, description="A size class, such as `480p` or `720p`.")]
FramesPerSecond = Annotated[int, Field(ge=1, le=60, description="Frames per second.")]
OutputFormat = Annotated[Literal["png", "jpeg", "webp"], Field(description="The image file's format.")]
LoraId = Annotated[str, Field(min_length=1, max_length=100, description="One of the model's LoRAs.")]
LoraScale = Annotated[float, Field(ge=-2, le=2, description="How strongly it works: 0 not at all.")]
FileFormat = Literal["png", "jpeg", "webp", "mp4"]
Pixels = Annotated[int, Field(ge=16, le=16_384)]
FrameCount = Annotated[int, Field(ge=1, le=10_000)]


def _located(name: Path, info: ValidationInfo) -> Path:
    return info.context["files"] / name if info.context else name


InputFile = Annotated[Path, AfterValidator(_located)]
"""A name in the folder of files; the whole path where validation is given `context={"files": folder}`."""


class Lora(BaseModel):
    """A LoRA that a caller picks."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: LoraId
    scale: LoraScale = 1.0


class AppliedLora(BaseModel):
    """The same for a pipeline, with its file where validation is given `context={"loras": {id: Component}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: LoraId
    scale: LoraScale
    weights: Component | None = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _located(cls, value: Any, info: ValidationInfo) -> Any:
        found = (info.context or {}).get("loras", {})
        return {**value, "weights": found[value["id"]]} if isinstance(value, dict) and value["id"] in found else value


Loras = Annotated[list[Lora], Field(max_length=4, description="LoRAs of the model, all at once.")]
AppliedLoras = tuple[AppliedLora, ...]


class Body(BaseModel):
    """What a caller sends: camelCase JSON, types exact, unknown fields kept apart to be named in the answer."""

    model_config = ConfigDict(
        alias_generator=to_camel, strict=True, extra="allow", frozen=True, protected_namespaces=()
    )

    @cached_property
    def given(self) -> dict[str, Any]:
        """The known fields that have a value, by their names here; an explicit null counts as not sent."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def unknown(self) -> frozenset[str]:
        """Field names, as sent, that no route of this kind knows."""
        return frozenset(self.model_extra or ())


class GenerateImage(Body):
    """`POST /api/image/fal/generate`."""

    prompt: Prompt
    model: ModelName
    image_url: Url | None = None
    image_urls: Annotated[list[Url], Field(min_length=1, max_length=10)] | None = None
    aspect_ratio: AspectRatio | None = None
    workflow: Workflow | None = None
    seed: Seed | None = None
    negative_prompt: NegativePrompt | None = None
    strength: Strength | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: GuidanceScale | None = None
    loras: Loras | None = None
    output_format: OutputFormat | None = None


class GenerateVideo(Body):
    """`POST /api/video/fal/generate`."""

    prompt: Prompt
    model: ModelName
    image_url: Url | None = None
    image_urls: Annotated[list[Url], Field(min_length=1, max_length=10)] | None = None
    video_url: Url | None = None
    audio_url: Url | None = None
    duration: Duration | None = None
    aspect_ratio: AspectRatio | None = None
    resolution: Resolution | None = None
    fps: FramesPerSecond | None = None
    workflow: Workflow | None = None
    seed: Seed | None = None
    negative_prompt: NegativePrompt | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: GuidanceScale | None = None
    loras: Loras | None = None


class UpscaleImage(Body):
    """`POST /api/image/fal/upscale`."""

    image_url: Url
    scale: Scale = 2
    model: ModelName | None = None
    output_format: OutputFormat | None = None


class RemoveBackgroundOf(Body):
    """`POST /api/image/fal/remove-bg`."""

    image_url: Url
    model: ModelName | None = None


class Params(BaseModel):
    """What a pipeline runs: complete, nothing left to choose. Stored with the job as camelCase JSON."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, extra="forbid", frozen=True, protected_namespaces=()
    )

    output_format: FileFormat = "png"


class TextToImage(Params):
    prompt: Prompt
    width: Pixels
    height: Pixels
    seed: Seed
    num_inference_steps: Steps
    guidance_scale: GuidanceScale = 0.0
    negative_prompt: NegativePrompt = ""
    loras: AppliedLoras = ()


class ImageToImage(TextToImage):
    """Also style transfer and editing. `images` are files; `width` and `height` are the output's."""

    images: tuple[InputFile, ...]
    strength: Strength = 1.0


class Upscale(Params):
    image: InputFile
    scale: Scale


class RemoveBackground(Params):
    image: InputFile


class TextToVideo(Params):
    """`num_frames` at `fps`: a count that the family allows, which `duration` was turned into."""

    output_format: Literal["mp4"] = "mp4"
    prompt: Prompt
    width: Pixels
    height: Pixels
    num_frames: FrameCount
    fps: FramesPerSecond
    seed: Seed
    num_inference_steps: Steps
    guidance_scale: GuidanceScale = 0.0
    negative_prompt: NegativePrompt = ""
    loras: AppliedLoras = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as Pillow has it."""
        return self.width, self.height


class ImageToVideo(TextToVideo):
    """`images`: the first frame, or the first and the last."""

    images: tuple[InputFile, ...]


class ReferenceToVideo(TextToVideo):
    """`images` show what is to appear; or `video` guides the motion. At least one of the two."""

    images: tuple[InputFile, ...] = ()
    video: InputFile | None = None


class ExtendVideo(TextToVideo):
    """`num_frames` are those added after the end of `video`."""

    video: InputFile


class LipSync(Params):
    """No family here does this: it runs on fal.ai only."""

    output_format: Literal["mp4"] = "mp4"
    video: InputFile
    audio: InputFile


PARAMS: dict[str, type[Params]] = {
    "text-to-image": TextToImage,
    "image-to-image": ImageToImage,
    "style-transfer": ImageToImage,
    "upscale": Upscale,
    "remove-bg": RemoveBackground,
    "text-to-video": TextToVideo,
    "image-to-video": ImageToVideo,
    "reference-to-video": ReferenceToVideo,
    "extend": ExtendVideo,
}
"""The params class of each workflow that runs here."""
