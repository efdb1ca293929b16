"""LTX Video, on diffusers' LTXConditionPipeline: text, images, a reference or the end of a video to video."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from pipelines.base import InvalidInput, OnStep, UnusableWeights, Weights
from pipelines.diffusion import (
    PromptEncoder,
    check_frame_count,
    check_size,
    compiled_blocks,
    step_callback,
    tiled_decoding,
)
from pipelines.loading import architecture_of, load_component, load_small, subprocess_loader
from pipelines.lora import apply_loras
from pipelines.media.images import open_covering
from pipelines.media.video import Frame, first_frames, last_frames
from pipelines.media.video_writer import VideoOutput, to_frames
from pipelines.params import ExtendVideo, ImageToVideo, ReferenceToVideo, TextToVideo
from pipelines.residency.residency import Residency

MAX_TOKENS = 256
PUBLISHED_LIMIT = 128
"""The limit in the published tokenizers, although training used 256 (Lightricks/LTX-Video-Trainer, issue 26)."""
FRAMES_PER_LATENT = 8
SIZE_MULTIPLE = 32
TRAINED_FRAMES = 257
CONTEXT_FRAMES = 17
"""How many frames of a video condition its extension, at most: two latents of motion after the first frame."""
REFERENCE_STRENGTH = 0.5
"""How much of a reference video is kept: denoising starts half way."""
WHOLE_FRAMES = 121
"""Longer videos are decoded in pieces, since decoding takes 100 bytes per pixel and frame."""
PIECE_FRAMES, PIECE_STRIDE = 96, 80
"""Frames of a piece, and between the starts of two: they overlap by two latents, over which they are blended."""
UNSHIFTED = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
"""LTXConditionPipeline has its own schedule, linear and then quadratic; the weights' config would shift it again."""
DECODE_TIMESTEP, DECODE_NOISE = 0.05, 0.025
"""For decoders that take a timestep: those of 0.9.1 and later (diffusers' guide, api/pipelines/ltx_video)."""


def build(weights: Weights, residency: Residency) -> "Ltx":
    """The adapter for one model. Loads no components; runs do."""
    return Ltx(weights, residency)


loader = subprocess_loader


class Ltx:
    """One LTX model. Keeps only the tokenizer and configs; diffusers' pipelines are made for each run."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        folder = weights.folder
        name = architecture_of(weights)
        if name not in ARCHITECTURES:
            raise UnusableWeights(f"{folder / 'model_index.json'}: {name} is not a supported LTX pipeline")
        self._weights = weights
        self._residency = residency
        self._tokenizer = load_small(folder, "tokenizer")
        limit = self._tokenizer.model_max_length
        max_tokens = limit if limit < PUBLISHED_LIMIT else MAX_TOKENS
        self._prompts = PromptEncoder(weights, residency, ("text_encoder",), ("tokenizer",), max_tokens)
        self._noise_scheduler = load_small(folder, "scheduler")

    def generate(self, params: TextToVideo, on_step: OnStep) -> VideoOutput:
        """A video of exactly `params.width` x `params.height` and `params.num_frames`, which `ExtendVideo` appends.

        Raises `InvalidInput` for an unsupported size or length and unusable input files, `InvalidOutput` for NaN or
        infinite values, and whatever `on_step` raises. The object can be used again after each of these.
        """
        check_size(*params.size, SIZE_MULTIPLE)
        check_frame_count(params.num_frames, FRAMES_PER_LATENT, isinstance(params, ExtendVideo))
        conditioning = CONDITIONING[type(params)](params)
        generator = torch.Generator("cpu").manual_seed(params.seed)  # the same noise on every device
        with torch.inference_mode():
            on_step("encode", 0, 1)
            embeds = self._encode_prompts(params)
            on_step("encode", 1, 1)
            latents = self._denoise(params, conditioning, embeds, generator, on_step)
            on_step("decode", 0, 1)
            frames = self._decode(latents, conditioning.frames, generator)
            on_step("decode", 1, 1)
        return VideoOutput(frames[conditioning.overlap_frames :], params.fps, conditioning.continues)

    def _encode_prompts(self, params: TextToVideo) -> dict[str, Any]:
        """Embeddings as diffusers' keyword arguments; the negative prompt's only with guidance."""
        embeds, mask = self._embeds(params.prompt)
        inputs = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if params.guidance_scale > 1:
            embeds, mask = self._embeds(params.negative_prompt)
            inputs |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
        return inputs

    def _embeds(self, text: str) -> tuple[torch.Tensor | None, ...]:
        """T5 embeddings (1, tokens, width), and their attention mask."""

        def encode() -> tuple[torch.Tensor | None, ...]:
            pipe = self._pipe("text_encoder")
            return pipe.encode_prompt(text, None, False, max_sequence_length=self._prompts.max_tokens)[:2]

        return self._prompts.embeds(text, encode)

    def _denoise(
        self,
        params: TextToVideo,
        conditioning: "Conditioning",
        embeds: dict[str, Any],
        generator: torch.Generator,
        on_step: OnStep,
    ) -> torch.Tensor:
        """Latents (1, channels, (frames - 1) / 8 + 1, height / 32, width / 32), normalised."""
        pipe = self._pipe("transformer", "vae")
        faster = compiled_blocks(pipe.transformer, self._weights.compiled and not params.loras)
        with apply_loras(pipe, params.loras, self._residency.device), faster:
            return pipe(
                conditions=list(conditioning.conditions) or None,
                **embeds,
                width=params.width,
                height=params.height,
                num_frames=conditioning.frames,
                frame_rate=params.fps,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                generator=generator,
                callback_on_step_end=step_callback(on_step),
                output_type="latent",
                return_dict=False,
            )[0]

    def _decode(self, latents: torch.Tensor, count: int, generator: torch.Generator) -> np.ndarray:
        """Frames (count, height, width, 3), 8 bits, as diffusers' own pipeline decodes them."""
        vae = self._acquire("vae")
        latents = LTXConditionPipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        ).to(vae.dtype)
        timestep = None
        if vae.config.timestep_conditioning:
            noise = torch.randn(latents.shape, generator=generator, dtype=vae.dtype).to(vae.device)
            share, timestep = torch.tensor([[DECODE_NOISE], [DECODE_TIMESTEP]], device=vae.device, dtype=vae.dtype)
            latents = (1 - share) * latents + share * noise
        vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = PIECE_FRAMES, PIECE_STRIDE
        vae.use_framewise_decoding = count > WHOLE_FRAMES
        with tiled_decoding(vae, self._residency.mode.tiled):
            pixels = vae.decode(latents, timestep, return_dict=False)[0][0]
        vae.use_framewise_decoding = False  # else it applies to encoding, too
        return to_frames(pixels)

    def _pipe(self, *names: str) -> LTXConditionPipeline:
        """diffusers' pipeline with only the named components."""
        parts = {"text_encoder": None, "transformer": None, "vae": None} | {name: self._acquire(name) for name in names}
        noise_scheduler = self._noise_scheduler.from_config(self._noise_scheduler.config, **UNSHIFTED)
        pipe = LTXConditionPipeline(**parts, tokenizer=self._tokenizer, scheduler=noise_scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _acquire(self, name: str) -> torch.nn.Module:
        return self._residency.acquire(self._weights.component(name), load_component)


ARCHITECTURES = frozenset({"LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"})
"""Names that `model_index.json` may have. Their components are the same, and LTXConditionPipeline does what all do."""


@dataclass(frozen=True)
class Conditioning:
    """What a run starts from, and the number of frames to make.

    The first `overlap_frames` are already in `continues`, the video that is extended.
    """

    frames: int
    conditions: tuple[LTXVideoCondition, ...] = ()
    overlap_frames: int = 0
    continues: Path | None = None


def from_text(params: TextToVideo) -> Conditioning:
    return Conditioning(params.num_frames)


def from_image(params: ImageToVideo) -> Conditioning:
    """Images are the first frame, or the first and the last."""
    if len(params.images) not in (1, 2):
        raise InvalidInput(f"This model takes 1 or 2 images, not {len(params.images)}.")
    pictures = [open_covering(path, params.size) for path in params.images]
    places = zip((0, params.num_frames - 1), pictures, strict=False)
    return Conditioning(
        params.num_frames, tuple(LTXVideoCondition(image=picture, frame_index=n) for n, picture in places)
    )


def from_video_end(params: ExtendVideo) -> Conditioning:
    """The last 8n + 1 frames condition the run: as many as fit in the length that the model was trained on."""
    wanted = min(CONTEXT_FRAMES, max(1, TRAINED_FRAMES - params.num_frames))
    frames = align_to_latents(last_frames(params.video, params.size, wanted, params.fps)[::-1])[::-1]
    start = Conditioning(len(frames) + params.num_frames, (video_condition(frames),))
    return replace(start, overlap_frames=len(frames), continues=params.video)


def from_reference(params: ReferenceToVideo) -> Conditioning:
    """A video whose composition and motion are kept: it is denoised from half way on."""
    if params.video is None or params.images:
        raise InvalidInput("This model takes a video as its reference, and no images.")
    frames = align_to_latents(first_frames(params.video, params.size, params.num_frames, params.fps))
    return Conditioning(params.num_frames, (replace(video_condition(frames), strength=REFERENCE_STRENGTH),))


CONDITIONING: Mapping[type[TextToVideo], Callable[[Any], Conditioning]] = {
    TextToVideo: from_text,
    ImageToVideo: from_image,
    ExtendVideo: from_video_end,
    ReferenceToVideo: from_reference,
}


def align_to_latents(frames: list[Frame]) -> list[Frame]:
    """The first 8n + 1 of them."""
    return frames[: (len(frames) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1]


def video_condition(frames: list[Frame]) -> LTXVideoCondition:
    return LTXVideoCondition(video=[Image.fromarray(frame) for frame in frames])
