"""Wan 2.1: text, image, references or a video's end to video, by diffusers, on components its variants share."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline

from pipelines.base import Loader, OnStep, UnusableWeights, Weights
from pipelines.clips import Clip, to_frames
from pipelines.compiled import compiled
from pipelines.loading import architecture_of, load_component, load_small, read_json
from pipelines.lora import worn
from pipelines.params import ImageToVideo, TextToVideo
from pipelines.prompts import Prompts
from pipelines.residency import Residency
from pipelines.steps import report_steps
from pipelines.tiling import tiled
from pipelines.wan_starts import RECIPES, Start, check, check_count

MAX_TOKENS = 512
SHIFTED_PIXELS = 600_000
"""diffusers' guide (api/pipelines/wan): the noise schedule is shifted by 5 for 720p, by 3 for 480p."""


def build(weights: Weights, residency: Residency) -> "Wan":
    """The adapter for one variant; its components come to the device when a run needs them."""
    return Wan(weights, residency)


def loader(weights: Weights, device: torch.device) -> Loader:
    """Diffusers' and transformers' `from_pretrained`: in a process of its own while a run is in this one."""
    return Loader(load_component, apart=True)


class Wan:
    """One variant of Wan. Keeps only tokenizer and configs; a run's diffusers pipelines are made for it and dropped."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        folder = weights.folder
        self._weights = weights
        self._residency = residency
        self._architecture = architecture_of(weights)
        if self._architecture not in ARCHITECTURES:
            raise UnusableWeights(f"{folder / 'model_index.json'}: {self._architecture} is not a Wan known here")
        self._pipeline, self._denoisers = ARCHITECTURES[self._architecture]
        self._tokenizer = load_small(folder, "tokenizer")
        max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length)
        self._prompts = Prompts(weights, residency, ("text_encoder",), ("tokenizer",), max_tokens)
        self._noise_scheduler = load_small(folder, "scheduler")
        self._image_processor = load_small(folder, "image_processor") if "image_encoder" in self._denoisers else None
        # Only the variant for first and last frames has positions for the tokens of two pictures.
        self._needs_last = bool(read_json(folder / "transformer" / "config.json").get("pos_embed_seq_len"))

    def generate(self, params: TextToVideo, on_step: OnStep) -> Clip:
        """A clip of exactly `params.width` x `params.height` and, but for extending, `params.num_frames`.

        Raises `InvalidInput` for a size or length that the model cannot make and for unusable input files, `BadOutput`
        for NaN or infinite values, and whatever `on_step` raises; after each of these the next run works.
        """
        check(params)
        start = self._start(params)
        generator = torch.Generator("cpu").manual_seed(params.seed)  # the same noise on every device
        with torch.inference_mode():
            on_step("encode", 0, 1)
            embeds = self._encode_prompts(params)
            on_step("encode", 1, 1)
            latents = self._denoise(params, start, embeds, generator, on_step)
            on_step("decode", 0, 1)
            frames = self._decode(latents[:, :, start.reference_latents :])
            on_step("decode", 1, 1)
        return Clip(frames[start.repeated :], params.fps, start.after)

    def _start(self, params: TextToVideo) -> Start:
        recipe = RECIPES.get((self._architecture, type(params)))
        if recipe is None:
            raise UnusableWeights(f"{self._weights.folder}: a {self._architecture} cannot run {type(params).__name__}")
        if self._architecture == "WanImageToVideoPipeline" and isinstance(params, ImageToVideo):
            check_count(params.images, 2 if self._needs_last else 1)
        return recipe(params)

    def _encode_prompts(self, params: TextToVideo) -> dict[str, Any]:
        """As diffusers' keyword arguments; the negative ones where there is guidance."""
        embeds = {"prompt_embeds": self._embeds(params, params.prompt)}
        if params.guidance_scale > 1:
            embeds["negative_prompt_embeds"] = self._embeds(params, params.negative_prompt)
        return embeds

    def _embeds(self, params: TextToVideo, text: str) -> torch.Tensor | None:
        """UMT5's (1, tokens, width)."""

        def encode() -> tuple[torch.Tensor | None]:
            pipe = self._pipe(WanPipeline, params, "text_encoder")
            return (pipe.encode_prompt(text, None, False, max_sequence_length=self._prompts.max_tokens)[0],)

        return self._prompts.embeds(text, encode)[0]

    def _denoise(
        self, params: TextToVideo, start: Start, embeds: dict[str, Any], generator: torch.Generator, on_step: OnStep
    ) -> torch.Tensor:
        """Latents (1, channels, count, height / 8, width / 8); the references' come first."""
        pipe = self._pipe(self._pipeline, params, *self._denoisers)
        tiles = tiled(pipe.vae, self._residency.way.tiled and pipe.vae is not None)
        faster = compiled(pipe.transformer, self._weights.compiled and not params.loras)
        with worn(pipe, params.loras, self._residency.device), tiles, faster:
            return pipe(
                **start.inputs,
                **embeds,
                width=params.width,
                height=params.height,
                num_frames=start.frames,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                generator=generator,
                callback_on_step_end=report_steps(on_step),
                output_type="latent",
                return_dict=False,
            )[0]

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        """Frames (count, height, width, 3), 8 bits, as diffusers' own pipelines decode them."""
        vae = self._hold("vae")
        latents = latents.to(vae.device, vae.dtype)
        mean, std = (
            torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        with tiled(vae, self._residency.way.tiled):
            return to_frames(vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][0])

    def _pipe(self, pipeline: Any, params: TextToVideo, *names: str) -> Any:
        """A diffusers pipeline on the named components alone."""
        parts: dict[str, Any] = {"text_encoder": None, "vae": None, "transformer": None}
        if "image_encoder" in names:
            parts["image_processor"] = self._image_processor
        parts |= {name: self._hold(name) for name in names}
        shift = 5.0 if params.width * params.height > SHIFTED_PIXELS else 3.0
        noise_scheduler = self._noise_scheduler.from_config(self._noise_scheduler.config, flow_shift=shift)
        pipe = pipeline(**parts, tokenizer=self._tokenizer, scheduler=noise_scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _hold(self, name: str) -> torch.nn.Module:
        return self._residency.hold(self._weights.component(name), load_component)


ARCHITECTURES: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "WanPipeline": (WanPipeline, ("transformer",)),
    "WanImageToVideoPipeline": (WanImageToVideoPipeline, ("image_encoder", "transformer", "vae")),
    "WanVACEPipeline": (WanVACEPipeline, ("transformer", "vae")),
}
"""By name: diffusers' class, and the components that it denoises with."""
