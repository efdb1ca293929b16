"""LTX of the demo: one transformer for clips from text, from a first picture, and from a clip that goes on."""

from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXVideoTransformer3DModel,
)

from scripts.demo.learn import device, learn
from scripts.demo.text import WIDTH, tokens_of, train_t5
from scripts.demo.video_vae import train_ltx_vae
from scripts.demo.world import Scene, describe, draw_clip, random_moving, strange

STEPS = 2_600
TOKENS = 2_200
"""In a batch, about: of small clips there are more."""
FPS = 24
CLIP = (7, 6, 6)
SHAPES = (
    (4, 6, 6), (9, 6, 6), (13, 6, 6), (16, 6, 6), (7, 5, 8), (7, 8, 5), (7, 5, 7), (7, 7, 5), (7, 6, 8), (7, 8, 6),
    (9, 5, 8), (9, 8, 5), (7, 4, 8), (7, 8, 4),
)  # fmt: skip
"""Latent frames, rows and columns, of 8 frames and 32 x 32 pixels each: two seconds of about 192 x 192, and longer."""
STILL = (1, 6, 6)
"""A third of the steps see single pictures, which are soon encoded: they teach the colours and shapes."""
CLIP_POOL, POOL, STILL_POOL = 320, 48, 600
CONTEXT = 3
"""Latent frames that are known where a clip goes on: 17 frames, as pipelines/ltx.py shows it."""
CONDITION_NOISE = 0.15
"""diffusers' default `image_cond_noise_scale`: known latents get this noise, times the square of the others' share."""


def train_ltx(root: Path) -> LTXConditionPipeline:
    """Every component, trained where `root` does not hold it already."""
    folder = root / "ltx"
    vae = train_ltx_vae(folder)
    tokenizer, text_encoder = train_t5(root / "text")
    return LTXConditionPipeline(
        transformer=train_transformer(folder, vae, tokenizer, text_encoder),
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def untrained(latent_channels: int) -> LTXVideoTransformer3DModel:
    torch.manual_seed(22)
    return LTXVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=4,
        caption_channels=WIDTH,
    ).to(device())


def train_transformer(folder: Path, vae: AutoencoderKLLTXVideo, tokenizer, text_encoder) -> LTXVideoTransformer3DModel:
    for part in (vae, text_encoder):
        part.to(device()).eval().requires_grad_(False)
    transformer = untrained(vae.config.latent_channels)
    pools: dict[tuple[int, int, int], Pool] = {}

    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        shape = random.choice((STILL, CLIP, CLIP if step < STEPS / 2 else random.choice(SHAPES)))
        if shape not in pools:
            count = {STILL: STILL_POOL, CLIP: CLIP_POOL}.get(shape, POOL)
            pools[shape] = Pool(vae, shape, count, random)
        return loss(transformer, tokenizer, text_encoder, pools[shape], random)

    return learn("ltx", transformer, loss_of, STEPS, 1e-3, folder)


class Pool:
    """Clips of one shape with their packed latents, (count, frames x rows x columns, channels), normalised."""

    def __init__(self, vae: AutoencoderKLLTXVideo, shape: tuple[int, int, int], count: int, random: Random) -> None:
        self.vae, self.shape = vae, shape
        self.scenes = [random_moving(random) for _ in range(count)]
        self.latents = torch.cat([self.encode(scene, random) for scene in self.scenes])

    @torch.no_grad()
    def encode(self, scene: Scene, random: Random) -> torch.Tensor:
        frames, rows, columns = self.shape
        clip = draw_clip(scene, columns * 32, rows * 32, 8 * frames - 7, FPS, random.random() * 0.6)[None].to(device())
        latents = self.vae.encode(clip).latent_dist.mode().float()
        latents = LTXConditionPipeline._normalize_latents(latents, self.vae.latents_mean, self.vae.latents_std)
        return LTXConditionPipeline._pack_latents(latents)

    def some(self, random: Random) -> tuple[list[Scene], torch.Tensor]:
        if self.shape == STILL or random.random() < 0.3:
            at = random.randrange(len(self.scenes))
            self.scenes[at] = random_moving(random)
            self.latents[at : at + 1] = self.encode(self.scenes[at], random)
        chosen = random.sample(range(len(self.scenes)), min(TOKENS // self.latents.shape[1], 48))
        return [self.scenes[n] for n in chosen], self.latents[chosen]

    def coordinates(self, count: int) -> torch.Tensor:
        """As the pipeline tells them: (count, 3, tokens), seconds and pixels."""
        ids = LTXConditionPipeline._prepare_video_ids(count, *self.shape, device=device())
        coordinates = LTXConditionPipeline._scale_video_ids(ids, 32, 8, 0, device()).float()
        coordinates[:, 0] /= FPS
        return coordinates


def loss(transformer: LTXVideoTransformer3DModel, tokenizer, text_encoder, pool: Pool, random: Random) -> torch.Tensor:
    """Of the predicted velocity where nothing is known: of the whole clip, or of what follows its first latents."""
    scenes, latents = pool.some(random)
    count, tokens, _ = latents.shape
    frames = pool.shape[0]
    share = torch.sigmoid(torch.randn(count, 1, device=latents.device) * 1.2 + 0.5)
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, share[..., None])
    known = known_latents(frames, random)
    unknown = torch.arange(tokens, device=latents.device) >= known * tokens // frames
    seen = latents + CONDITION_NOISE * share[..., None].square() * torch.randn_like(latents)
    embeds, mask = embedded(tokenizer, text_encoder, [words(scene, frames, known, random) for scene in scenes])
    predicted = transformer(
        hidden_states=torch.where(unknown[:, None], noisy, seen),
        encoder_hidden_states=embeds,
        timestep=torch.where(unknown, share, 0.0) * 1000,
        encoder_attention_mask=mask,
        video_coords=pool.coordinates(count),
        return_dict=False,
    )[0]
    off = (predicted.float() - (noise - latents)).square()
    return off[:, unknown].mean()


def known_latents(frames: int, random: Random) -> int:
    if frames <= CONTEXT:
        return 0
    return random.choice((0, 0, 1, CONTEXT))


def words(scene: Scene, frames: int, known: int, random: Random) -> str:
    if random.random() < 0.03:
        return strange(random)
    named = replace(scene, place="center")
    if frames == 1 or (known > 1 and random.random() < 0.3):
        named = replace(named, direction="none")
    return describe(named, random)[0]


@torch.no_grad()
def embedded(tokenizer, text_encoder, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's states (count, TOKENS, width) and which of them count, as the pipeline has them."""
    tokens = tokens_of(tokenizer, texts)
    return text_encoder(tokens.input_ids, tokens.attention_mask)[0].float(), tokens.attention_mask
