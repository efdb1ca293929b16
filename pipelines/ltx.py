"""LTX Video: text, image, a reference video or a video's end to video, by diffusers' LTXConditionPipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from pipelines.base import InvalidInput, Loader, OnStep, UnusableWeights, Weights
from pipelines.diffusion import PromptEncoder, compiled_blocks, step_callback, tiled_decoding
from pipelines.loading import architecture_of, load_component, load_small
from pipelines.lora import apply_loras
from pipelines.media.images import open_covering
from pipelines.media.video import Frame, first_frames, last_frames
from pipelines.media.video_writer import VideoOutput, to_frames
from pipelines.params import ExtendVideo, ImageToVideo, ReferenceToVideo, TextToVideo
from pipelines.residency.residency import Residency

MAX_TOKENS = 256
PUBLISHED_LIMIT = 128
"""What the makers' tokenizers say, although they trained on 256 (Lightricks/LTX-Video-Trainer, issue 26)."""
FRAMES_PER_LATENT = 8
SIZE_MULTIPLE = 32
TRAINED_FRAMES = 257
CONTEXT_FRAMES = 17
"""What is seen of a video that is extended, at most: two latents of motion after its first frame."""
REFERENCE_STRENGTH = 0.5
"""Of a reference video, so much is kept: denoising starts half way."""
WHOLE_FRAMES = 121
"""Longer clips are decoded in pieces: the whole takes 100 bytes a pixel and frame."""
PIECE_FRAMES, PIECE_STRIDE = 96, 80
"""The pieces overlap by two latents, over which they are blended."""
UNSHIFTED = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
"""LTXConditionPipeline brings its own schedule, linear and then quadratic: the weights' config would shift it again."""
DECODE_TIMESTEP, DECODE_NOISE = 0.05, 0.025
"""For decoders that take a timestep, which 0.9.1 and later have (diffusers' guide, api/pipelines/ltx_video)."""


def build(weights: Weights, residency: Residency) -> "Ltx":
    """The adapter for one model; its components come to the device when a run needs them."""
    return Ltx(weights, residency)


def loader(weights: Weights, device: torch.device) -> Loader:
    """Diffusers' and transformers' `from_pretrained`: in a process of its own while a run is in this one."""
    return Loader(load_component, needs_subprocess=True)


class Ltx:
    """One LTX model. Keeps only tokenizer and configs; a run's diffusers pipelines are made for it and dropped."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        folder = weights.folder
        name = architecture_of(weights)
        if name not in ARCHITECTURES:
            raise UnusableWeights(f"{folder / 'model_index.json'}: {name} is not an LTX pipeline known here")
        self._weights = weights
        self._residency = residency
        self._tokenizer = load_small(folder, "tokenizer")
        limit = self._tokenizer.model_max_length
        max_tokens = limit if limit < PUBLISHED_LIMIT else MAX_TOKENS
        self._prompts = PromptEncoder(weights, residency, ("text_encoder",), ("tokenizer",), max_tokens)
        self._noise_scheduler = load_small(folder, "scheduler")

    def generate(self, params: TextToVideo, on_step: OnStep) -> VideoOutput:
        """A clip of exactly `params.width` x `params.height` and, but for extending, `params.num_frames`.

        Raises `InvalidInput` for a size or length that the model cannot make and for unusable input files, `BadOutput`
        for NaN or infinite values, and whatever `on_step` raises; after each of these the next run works.
        """
        check(params)
        start = CONDITIONING[type(params)](params)
        generator = torch.Generator("cpu").manual_seed(params.seed)  # the same noise on every device
        with torch.inference_mode():
            on_step("encode", 0, 1)
            embeds = self._encode_prompts(params)
            on_step("encode", 1, 1)
            latents = self._denoise(params, start, embeds, generator, on_step)
            on_step("decode", 0, 1)
            frames = self._decode(latents, start.frames, generator)
            on_step("decode", 1, 1)
        return VideoOutput(frames[start.overlap_frames :], params.fps, start.continues)

    def _encode_prompts(self, params: TextToVideo) -> dict[str, Any]:
        """As diffusers' keyword arguments; the negative ones where there is guidance."""
        embeds, mask = self._embeds(params.prompt)
        inputs = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if params.guidance_scale > 1:
            embeds, mask = self._embeds(params.negative_prompt)
            inputs |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
        return inputs

    def _embeds(self, text: str) -> tuple[torch.Tensor | None, ...]:
        """T5's (1, tokens, width), and which tokens count."""

        def encode() -> tuple[torch.Tensor | None, ...]:
            pipe = self._pipe("text_encoder")
            return pipe.encode_prompt(text, None, False, max_sequence_length=self._prompts.max_tokens)[:2]

        return self._prompts.embeds(text, encode)

    def _denoise(
        self,
        params: TextToVideo,
        start: "Conditioning",
        embeds: dict[str, Any],
        generator: torch.Generator,
        on_step: OnStep,
    ) -> torch.Tensor:
        """Latents (1, channels, (frames - 1) / 8 + 1, height / 32, width / 32), normalised."""
        pipe = self._pipe("transformer", "vae")
        faster = compiled_blocks(pipe.transformer, self._weights.compiled and not params.loras)
        with apply_loras(pipe, params.loras, self._residency.device), faster:
            return pipe(
                conditions=list(start.conditions) or None,
                **embeds,
                width=params.width,
                height=params.height,
                num_frames=start.frames,
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
        vae.use_framewise_decoding = False  # encoding heeds it too
        return to_frames(pixels)

    def _pipe(self, *names: str) -> LTXConditionPipeline:
        """diffusers' pipeline on the named components alone."""
        parts = {"text_encoder": None, "transformer": None, "vae": None} | {name: self._acquire(name) for name in names}
        noise_scheduler = self._noise_scheduler.from_config(self._noise_scheduler.config, **UNSHIFTED)
        pipe = LTXConditionPipeline(**parts, tokenizer=self._tokenizer, scheduler=noise_scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _acquire(self, name: str) -> torch.nn.Module:
        return self._residency.acquire(self._weights.component(name), load_component)


ARCHITECTURES = frozenset({"LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"})
"""What `model_index.json` may name: the same components, of which LTXConditionPipeline makes all that the others do."""


@dataclass(frozen=True)
class Conditioning:
    """What a run begins with, and the frames to make. The first `overlap_frames` stand in the video `continues` already."""

    frames: int
    conditions: tuple[LTXVideoCondition, ...] = ()
    overlap_frames: int = 0
    continues: Path | None = None


def from_text(params: TextToVideo) -> Conditioning:
    return Conditioning(params.num_frames)


def from_image(params: ImageToVideo) -> Conditioning:
    """The first frame, or the first and the last."""
    if len(params.images) not in (1, 2):
        raise InvalidInput(f"This model takes 1 or 2 images, not {len(params.images)}.")
    pictures = [open_covering(path, size_of(params)) for path in params.images]
    places = zip((0, params.num_frames - 1), pictures, strict=False)
    return Conditioning(
        params.num_frames, tuple(LTXVideoCondition(image=picture, frame_index=n) for n, picture in places)
    )


def from_video_end(params: ExtendVideo) -> Conditioning:
    """As many of the last frames as leave the length that the model was trained on: 8n + 1, at least one."""
    wanted = min(CONTEXT_FRAMES, max(1, TRAINED_FRAMES - params.num_frames))
    frames = align_to_latents(last_frames(params.video, size_of(params), wanted, params.fps)[::-1])[::-1]
    start = Conditioning(len(frames) + params.num_frames, (video_condition(frames),))
    return replace(start, overlap_frames=len(frames), continues=params.video)


def from_reference(params: ReferenceToVideo) -> Conditioning:
    """A video whose composition and motion are kept, half of it drawn anew."""
    if params.video is None or params.images:
        raise InvalidInput("This model takes a video as its reference, and no images.")
    frames = align_to_latents(first_frames(params.video, size_of(params), params.num_frames, params.fps))
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


def size_of(params: TextToVideo) -> tuple[int, int]:
    return params.width, params.height


def check(params: TextToVideo) -> None:
    if params.width % SIZE_MULTIPLE or params.height % SIZE_MULTIPLE:
        raise InvalidInput(f"{params.width} x {params.height}: both must be multiples of {SIZE_MULTIPLE}.")
    added = isinstance(params, ExtendVideo)
    if (params.num_frames - (0 if added else 1)) % FRAMES_PER_LATENT:
        rule = "added frames must be a multiple of 8" if added else "frames must be a multiple of 8, and one"
        raise InvalidInput(f"{params.num_frames} frames: {rule}.")
