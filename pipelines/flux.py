"""Flux.1 dev, schnell and Kontext, on diffusers, in three phases (encode, denoise, decode) with shared components."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pipelines.base import InvalidInput, InvalidOutput, OnStep, UnusableWeights, Weights, round_to_multiple
from pipelines.diffusion import PromptEncoder, check_size, compiled_blocks, step_callback, tiled_decoding
from pipelines.loading import architecture_of, load_component, load_small, read_json, subprocess_loader
from pipelines.lora import apply_loras
from pipelines.media.images import open_covering, open_flat
from pipelines.params import ImageToImage, TextToImage
from pipelines.residency.residency import Residency

COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
TRUE_GUIDANCE_SCALE = 2.0
"""Classifier-free guidance, used if there is a negative prompt; Flux's own, distilled guidance has none."""
REFERENCE_AREA = 1024**2
"""Pixels of a Kontext reference: it was trained on one megapixel, in multiples of 16 (diffusers lists the sizes)."""


def build(weights: Weights, residency: Residency) -> "Flux":
    """The adapter for one model. Loads no components; runs do."""
    return Flux(weights, residency)


loader = subprocess_loader


class Flux:
    """One Flux model. Keeps only tokenizers and configs; diffusers' pipelines are made for each run."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        folder = weights.folder
        self._weights = weights
        self._residency = residency
        self._recipes = recipes_for(weights)
        self._vae = read_json(folder / "vae" / "config.json")
        self._vae_scale = 2 ** (len(self._vae["block_out_channels"]) - 1)
        self._tokenizer = load_small(folder, "tokenizer")
        self._tokenizer_2 = load_small(folder, "tokenizer_2")
        self._noise_scheduler = load_small(folder, "scheduler")
        # schnell, the model without guidance embeddings, was distilled on 256 tokens; the others take 512.
        guided = read_json(folder / "transformer" / "config.json")["guidance_embeds"]
        max_tokens = min(512 if guided else 256, self._tokenizer_2.model_max_length)
        self._prompts = PromptEncoder(
            weights, residency, ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"), max_tokens
        )

    def generate(self, params: TextToImage, on_step: OnStep) -> Image.Image:
        """One RGB picture of exactly `params.width` x `params.height`.

        Raises `InvalidInput` for an unsupported size and unusable input images, `InvalidOutput` for NaN or infinite
        pixels, and whatever `on_step` raises. The object can be used again after each of these.
        """
        check_size(params.width, params.height, 2 * self._vae_scale)
        recipe = self._recipes[type(params)]
        picture = recipe.picture(params, 2 * self._vae_scale)
        special = recipe.special(params)
        if picture and special.get("strength") == 0:
            return picture
        generator = torch.Generator("cpu").manual_seed(params.seed)  # the same noise on every device
        with torch.inference_mode():
            on_step("encode", 0, 1)
            inputs = self._encode_prompts(recipe, params)
            if picture:
                inputs["image"] = self._encode_picture(recipe, picture, generator)
            on_step("encode", 1, 1)
            latents = self._denoise(recipe, params, inputs | special, generator, on_step)
            on_step("decode", 0, 1)
            output = self._decode(latents, params)
            on_step("decode", 1, 1)
        return output

    def _encode_prompts(self, recipe: "Recipe", params: TextToImage) -> dict[str, Any]:
        """T5 embeddings (1, tokens, width) and CLIP's pooled one (1, width), as diffusers' keyword arguments."""
        embeds, pooled = self._embeds(recipe, params.prompt)
        inputs = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if params.negative_prompt:
            embeds, pooled = self._embeds(recipe, params.negative_prompt)
            inputs |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
            inputs |= {"true_cfg_scale": TRUE_GUIDANCE_SCALE}
        return inputs

    def _embeds(self, recipe: "Recipe", text: str) -> tuple[torch.Tensor | None, ...]:
        """T5 embeddings, and CLIP's pooled one."""

        def encode() -> tuple[torch.Tensor, torch.Tensor]:
            pipe = self._pipe(recipe, "text_encoder", "text_encoder_2")
            embeds, pooled, _ = pipe.encode_prompt(text, max_sequence_length=self._prompts.max_tokens)
            return embeds, pooled

        return self._prompts.embeds(text, encode)

    def _encode_picture(self, recipe: "Recipe", picture: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """Latents (1, channels, height / 8, width / 8); image-to-image samples them, Kontext takes their mode."""
        pipe = self._pipe(recipe, "vae")
        pixels = pipe.image_processor.preprocess(picture).to(pipe.vae.device, pipe.vae.dtype)
        return pipe._encode_vae_image(pixels, generator)

    def _denoise(
        self, recipe: "Recipe", params: TextToImage, inputs: dict[str, Any], generator: torch.Generator, on_step: OnStep
    ) -> torch.Tensor:
        """Packed latents (1, tokens, 4 x channels). A model without guidance embeddings ignores `guidance_scale`."""
        pipe = self._pipe(recipe, "transformer")
        dtype = pipe.transformer.dtype
        faster = compiled_blocks(pipe.transformer, self._weights.compiled and not params.loras)
        with apply_loras(pipe, params.loras, self._residency.device), faster:
            return pipe(
                **{name: cast(value, dtype) for name, value in inputs.items()},
                width=params.width,
                height=params.height,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                generator=generator,
                callback_on_step_end=step_callback(on_step),
                output_type="latent",
                return_dict=False,
            )[0]

    def _decode(self, latents: torch.Tensor, params: TextToImage) -> Image.Image:
        """As in diffusers' guide to running components separately (docs: training/distributed_inference)."""
        vae = self._acquire("vae")
        latents = FluxPipeline._unpack_latents(latents, params.height, params.width, self._vae_scale)
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with tiled_decoding(vae, self._residency.mode.tiled):
            pixels = vae.decode(latents, return_dict=False)[0]
        if not torch.isfinite(pixels).all():
            raise InvalidOutput(f"{self._weights.model}: the output has NaN or infinite pixels")
        return VaeImageProcessor().postprocess(pixels)[0]

    def _pipe(self, recipe: "Recipe", *names: str) -> Any:
        """The recipe's diffusers pipeline with only the named components, and the VAE's geometry even without it."""
        parts = dict.fromkeys(COMPONENTS) | {name: self._acquire(name) for name in names}
        noise_scheduler = self._noise_scheduler.from_config(self._noise_scheduler.config)
        pipe = recipe.pipeline(
            **parts, tokenizer=self._tokenizer, tokenizer_2=self._tokenizer_2, scheduler=noise_scheduler
        )
        pipe.vae_scale_factor = self._vae_scale
        pipe.latent_channels = self._vae["latent_channels"]
        pipe.image_processor = VaeImageProcessor(
            vae_scale_factor=2 * self._vae_scale, vae_latent_channels=self._vae["latent_channels"]
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _acquire(self, name: str) -> torch.nn.Module:
        return self._residency.acquire(self._weights.component(name), load_component)


@dataclass(frozen=True)
class Recipe:
    """How one architecture runs one kind of params.

    `picture(params, multiple)` makes its input picture; `special(params)` its further arguments for diffusers.
    """

    pipeline: Any
    picture: Callable[[Any, int], Image.Image | None]
    special: Callable[[Any], dict[str, Any]]


def no_picture(params: TextToImage, multiple: int) -> None:
    return None


def start_picture(params: ImageToImage, multiple: int) -> Image.Image:
    """The input image, scaled (Lanczos) to cover the output's size and cropped to its centre."""
    if len(params.images) != 1:
        raise InvalidInput(f"This model takes one image, not {len(params.images)}.")
    return open_covering(params.images[0], (params.width, params.height))


def reference_picture(params: ImageToImage, multiple: int) -> Image.Image:
    """Kontext's reference: the input images side by side at one height, not cropped.

    Kontext takes one picture; ComfyUI's ImageStitch combines several in the same way. The area is the one that Kontext
    was trained on, or the output's if that is less. The aspect ratio is kept, up to the rounding to `multiple` pixels.
    """
    if not params.images:
        raise InvalidInput("Editing needs at least one image.")
    pictures = [open_flat(path) for path in params.images]
    ratios = [picture.width / picture.height for picture in pictures]
    area = min(params.width * params.height, REFERENCE_AREA)
    width, height = (round_to_multiple(side, multiple) for side in (sqrt(area * sum(ratios)), sqrt(area / sum(ratios))))
    row = Image.new("RGB", (width, height))
    for i, picture in enumerate(pictures):
        left, right = (round(row.width * sum(ratios[:n]) / sum(ratios)) for n in (i, i + 1))
        row.paste(picture.resize((max(1, right - left), row.height), Image.Resampling.LANCZOS), (left, 0))
    return row


def nothing(params: TextToImage) -> dict[str, Any]:
    return {}


def strength(params: ImageToImage) -> dict[str, Any]:
    """diffusers runs the last ceil(steps x strength) steps: with 0 there are none, and the input is the output."""
    return {"strength": params.strength}


def whole_area(params: TextToImage) -> dict[str, Any]:
    """Kontext rescales its output to `max_area`; with this one the requested size is kept."""
    return {"max_area": params.width * params.height}


RECIPES: dict[tuple[str, type[TextToImage]], Recipe] = {
    ("FluxPipeline", TextToImage): Recipe(FluxPipeline, no_picture, nothing),
    ("FluxPipeline", ImageToImage): Recipe(FluxImg2ImgPipeline, start_picture, strength),
    ("FluxKontextPipeline", TextToImage): Recipe(FluxKontextPipeline, no_picture, whole_area),
    ("FluxKontextPipeline", ImageToImage): Recipe(FluxKontextPipeline, reference_picture, whole_area),
}
"""By architecture and class of params."""


def recipes_for(weights: Weights) -> dict[type[TextToImage], Recipe]:
    """The recipes of the weights' architecture, by class of params."""
    name = architecture_of(weights)
    recipes = {kind: recipe for (architecture, kind), recipe in RECIPES.items() if architecture == name}
    if not recipes:
        raise UnusableWeights(f"{weights.folder / 'model_index.json'}: unsupported Flux pipeline {name}")
    return recipes


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value
