"""Wan 2.1, on diffusers: text, images, references or the end of a video to video. Its variants share components."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline
from PIL import Image, ImageOps

from pipelines.base import InvalidInput, OnStep, UnusableWeights, Weights
from pipelines.diffusion import (
    PromptEncoder,
    check_frame_count,
    check_size,
    compiled_blocks,
    step_callback,
    tiled_decoding,
)
from pipelines.loading import architecture_of, load_component, load_small, read_json, subprocess_loader
from pipelines.lora import apply_loras
from pipelines.media.images import open_covering, open_flat
from pipelines.media.video import first_frames, last_frames
from pipelines.media.video_writer import VideoOutput, to_frames
from pipelines.params import ExtendVideo, ImageToVideo, ReferenceToVideo, TextToVideo
from pipelines.residency.residency import Residency

MAX_TOKENS = 512
SHIFTED_PIXELS = 600_000
"""diffusers' guide (api/pipelines/wan): the noise schedule is shifted by 5 for 720p, by 3 for 480p."""
FRAMES_PER_LATENT = 4
SIZE_MULTIPLE = 16
TRAINED_FRAMES = 81
CONTEXT_FRAMES = 17
"""How many frames of a video VACE sees, at most, when it extends it: a second of motion."""
UNKNOWN = Image.new("RGB", (1, 1), (128, 128, 128))
"""Mid-grey, which is 0 to the VAE: VACE was trained with it in place of unknown frames."""


def build(weights: Weights, residency: Residency) -> "Wan":
    """The adapter for one variant. Loads no components; runs do."""
    return Wan(weights, residency)


loader = subprocess_loader


class Wan:
    """One variant of Wan. Keeps only the tokenizer and configs; diffusers' pipelines are made for each run."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        folder = weights.folder
        self._weights = weights
        self._residency = residency
        self._architecture = architecture_of(weights)
        if self._architecture not in ARCHITECTURES:
            raise UnusableWeights(
                f"{folder / 'model_index.json'}: {self._architecture} is not a supported Wan pipeline"
            )
        self._pipeline, self._denoisers = ARCHITECTURES[self._architecture]
        self._tokenizer = load_small(folder, "tokenizer")
        max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length)
        self._prompts = PromptEncoder(weights, residency, ("text_encoder",), ("tokenizer",), max_tokens)
        self._noise_scheduler = load_small(folder, "scheduler")
        self._image_processor = load_small(folder, "image_processor") if "image_encoder" in self._denoisers else None
        # Only the variant for first and last frames has position embeddings for the tokens of two pictures.
        self._needs_last = bool(read_json(folder / "transformer" / "config.json").get("pos_embed_seq_len"))

    def generate(self, params: TextToVideo, on_step: OnStep) -> VideoOutput:
        """A video of exactly `params.width` x `params.height` and `params.num_frames`, which `ExtendVideo` appends.

        Raises `InvalidInput` for an unsupported size or length and unusable input files, `InvalidOutput` for NaN or
        infinite values, and whatever `on_step` raises. The object can be used again after each of these.
        """
        check_size(*params.size, SIZE_MULTIPLE)
        check_frame_count(params.num_frames, FRAMES_PER_LATENT, isinstance(params, ExtendVideo))
        conditioning = self._conditioning(params)
        generator = torch.Generator("cpu").manual_seed(params.seed)  # the same noise on every device
        with torch.inference_mode():
            on_step("encode", 0, 1)
            embeds = self._encode_prompts(params)
            on_step("encode", 1, 1)
            latents = self._denoise(params, conditioning, embeds, generator, on_step)
            on_step("decode", 0, 1)
            frames = self._decode(latents[:, :, conditioning.reference_latents :])
            on_step("decode", 1, 1)
        return VideoOutput(frames[conditioning.overlap_frames :], params.fps, conditioning.continues)

    def _conditioning(self, params: TextToVideo) -> "Conditioning":
        recipe = CONDITIONING.get((self._architecture, type(params)))
        if recipe is None:
            raise UnusableWeights(f"{self._weights.folder}: a {self._architecture} cannot run {type(params).__name__}")
        if self._architecture == "WanImageToVideoPipeline" and isinstance(params, ImageToVideo):
            check_count(params.images, 2 if self._needs_last else 1)
        return recipe(params)

    def _encode_prompts(self, params: TextToVideo) -> dict[str, Any]:
        """Embeddings as diffusers' keyword arguments; the negative prompt's only with guidance."""
        embeds = {"prompt_embeds": self._embeds(params, params.prompt)}
        if params.guidance_scale > 1:
            embeds["negative_prompt_embeds"] = self._embeds(params, params.negative_prompt)
        return embeds

    def _embeds(self, params: TextToVideo, text: str) -> torch.Tensor | None:
        """UMT5 embeddings (1, tokens, width)."""

        def encode() -> tuple[torch.Tensor | None]:
            pipe = self._pipe(WanPipeline, params, "text_encoder")
            return (pipe.encode_prompt(text, None, False, max_sequence_length=self._prompts.max_tokens)[0],)

        return self._prompts.embeds(text, encode)[0]

    def _denoise(
        self,
        params: TextToVideo,
        conditioning: "Conditioning",
        embeds: dict[str, Any],
        generator: torch.Generator,
        on_step: OnStep,
    ) -> torch.Tensor:
        """Latents (1, channels, count, height / 8, width / 8); those of references come first."""
        pipe = self._pipe(self._pipeline, params, *self._denoisers)
        tiles = tiled_decoding(pipe.vae, self._residency.mode.tiled and pipe.vae is not None)
        faster = compiled_blocks(pipe.transformer, self._weights.compiled and not params.loras)
        with apply_loras(pipe, params.loras, self._residency.device), tiles, faster:
            return pipe(
                **conditioning.inputs,
                **embeds,
                width=params.width,
                height=params.height,
                num_frames=conditioning.frames,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                generator=generator,
                callback_on_step_end=step_callback(on_step),
                output_type="latent",
                return_dict=False,
            )[0]

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        """Frames (count, height, width, 3), 8 bits, as diffusers' own pipelines decode them."""
        vae = self._acquire("vae")
        latents = latents.to(vae.device, vae.dtype)
        mean, std = (
            torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        with tiled_decoding(vae, self._residency.mode.tiled):
            return to_frames(vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][0])

    def _pipe(self, pipeline: Any, params: TextToVideo, *names: str) -> Any:
        """A diffusers pipeline with only the named components."""
        parts: dict[str, Any] = {"text_encoder": None, "vae": None, "transformer": None}
        if "image_encoder" in names:
            parts["image_processor"] = self._image_processor
        parts |= {name: self._acquire(name) for name in names}
        shift = 5.0 if params.width * params.height > SHIFTED_PIXELS else 3.0
        noise_scheduler = self._noise_scheduler.from_config(self._noise_scheduler.config, flow_shift=shift)
        pipe = pipeline(**parts, tokenizer=self._tokenizer, scheduler=noise_scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _acquire(self, name: str) -> torch.nn.Module:
        return self._residency.acquire(self._weights.component(name), load_component)


@dataclass(frozen=True)
class Conditioning:
    """What a run starts from: the caller's files as diffusers' keyword arguments, and the number of frames to make.

    The first `overlap_frames` are already in `continues`, the video that is extended. References have
    `reference_latents` of their own, before those of the frames.
    """

    inputs: Mapping[str, Any]
    frames: int
    overlap_frames: int = 0
    continues: Path | None = None
    reference_latents: int = 0


def from_text(params: TextToVideo) -> Conditioning:
    return Conditioning({}, params.num_frames)


def from_image(params: ImageToVideo) -> Conditioning:
    """Images are the first frame, or the first and the last."""
    pictures = [open_covering(path, params.size) for path in params.images]
    return Conditioning(dict(zip(("image", "last_image"), pictures, strict=False)), params.num_frames)


def from_video_end(params: ExtendVideo) -> Conditioning:
    """Only the last frame conditions the run: image-to-video was trained with one known frame."""
    frames = last_frames(params.video, params.size, 1, params.fps)
    return Conditioning(
        {"image": Image.fromarray(frames[0])}, 1 + params.num_frames, overlap_frames=1, continues=params.video
    )


def vace_from_image(params: ImageToVideo) -> Conditioning:
    check_count(params.images, 1, 2)
    pictures = [open_covering(path, params.size) for path in params.images]
    known = dict(zip((0, params.num_frames - 1), pictures, strict=False))
    return Conditioning(inpainting(known, params.num_frames, params.size), params.num_frames)


def vace_from_end(params: ExtendVideo) -> Conditioning:
    """The last 4n + 1 frames condition the run: as many as fit in the length that the model was trained on."""
    wanted = min(CONTEXT_FRAMES, max(1, TRAINED_FRAMES - params.num_frames))
    frames = last_frames(params.video, params.size, wanted, params.fps)
    frames = frames[-((len(frames) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1) :]
    count = len(frames) + params.num_frames
    known = {n: Image.fromarray(frame) for n, frame in enumerate(frames)}
    return Conditioning(
        inpainting(known, count, params.size), count, overlap_frames=len(frames), continues=params.video
    )


def vace_from_references(params: ReferenceToVideo) -> Conditioning:
    """Images show what is to appear; a video's shapes and motion are kept, by VACE's task of colouring grey video."""
    inputs: dict[str, Any] = {}
    if params.images:
        inputs["reference_images"] = [ImageOps.contain(open_flat(path), params.size) for path in params.images]
    if params.video:
        frames = first_frames(params.video, params.size, params.num_frames, params.fps)
        greys = [ImageOps.grayscale(Image.fromarray(frame)).convert("RGB") for frame in frames]
        inputs["video"] = greys + [UNKNOWN.resize(params.size)] * (params.num_frames - len(greys))
    if not inputs:
        raise InvalidInput("A reference is needed: images, a video, or both.")
    return Conditioning(inputs, params.num_frames, reference_latents=len(params.images))


def inpainting(known: Mapping[int, Image.Image], count: int, size: tuple[int, int]) -> dict[str, Any]:
    """VACE's masked video: the mask is black for known frames, white for frames to generate."""
    black, white, unknown = Image.new("L", size, 0), Image.new("L", size, 255), UNKNOWN.resize(size)
    return {
        "video": [known.get(n, unknown) for n in range(count)],
        "mask": [black if n in known else white for n in range(count)],
    }


CONDITIONING: Mapping[tuple[str, type[TextToVideo]], Callable[[Any], Conditioning]] = {
    ("WanPipeline", TextToVideo): from_text,
    ("WanImageToVideoPipeline", ImageToVideo): from_image,
    ("WanImageToVideoPipeline", ExtendVideo): from_video_end,
    ("WanVACEPipeline", TextToVideo): from_text,
    ("WanVACEPipeline", ImageToVideo): vace_from_image,
    ("WanVACEPipeline", ReferenceToVideo): vace_from_references,
    ("WanVACEPipeline", ExtendVideo): vace_from_end,
}


def check_count(images: Sequence[Path], *counts: int) -> None:
    if len(images) not in counts:
        takes = " or ".join(map(str, counts))
        raise InvalidInput(f"This model takes {takes} image{'s' * (max(counts) > 1)}, not {len(images)}.")


ARCHITECTURES: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "WanPipeline": (WanPipeline, ("transformer",)),
    "WanImageToVideoPipeline": (WanImageToVideoPipeline, ("image_encoder", "transformer", "vae")),
    "WanVACEPipeline": (WanVACEPipeline, ("transformer", "vae")),
}
"""By class name in `model_index.json`: diffusers' class, and the components that denoising needs."""
