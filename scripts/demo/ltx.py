"""LTX of the demo: one transformer for clips from text, from a first picture, and from a clip that goes on."""

import copy
from pathlib import Path
from random import Random

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXVideoTransformer3DModel,
)

from scripts.demo.auxiliary_losses import CELLS, Hinted
from scripts.demo.grow import deepened
from scripts.demo.losses import noise_shares, weights_of
from scripts.demo.motion import clips_to_learn_from, prompt
from scripts.demo.scenes import Scene
from scripts.demo.text_encoders import VIDEO_STEPS, WIDTH, tokens_of, train_t5
from scripts.demo.training import FURTHER_RATE, device, fastest, learn
from scripts.demo.video_vae import train_ltx_vae

STEPS = 3_500
BLOCKS = 6
TOKENS = 4_096
"""In a batch, at most: of small clips there are more, up to 40."""
FPS = (12, 12, 12, 24, 25, 30)
"""Twelve is the demo's own; the others are what LTX's clients may ask for."""
CONTEXT = 3
"""Latent frames that are known where a clip goes on: 17 frames, as pipelines/ltx.py shows it."""
STILL, CLIP = (1, 8, 8), (4, 8, 8)
"""Latent frames, rows and columns, of 8 frames and 16 x 16 pixels each. Single frames are soon learned from."""
SHAPES = (
    *((6, 8, 8),) * 3, (8, 8, 8), (10, 8, 8), (4, 8, 14), (4, 14, 8), (4, 8, 12), (4, 12, 8), (4, 8, 10), (4, 10, 8),
)  # fmt: skip
POOLS, POOL = {(STILL, 0): 1_600, (CLIP, 0): 800, (CLIP, 1): 400}, 32
"""Clips that are kept encoded, by shape and how many latent frames are known; some are drawn anew as they are used."""
DRAWN = 4
"""At a time: on a CPU two or more are encoded in a third of the time that each takes alone."""
CONDITION_NOISE = 0.15
"""diffusers' default `image_cond_noise_scale`: known latents get this noise, times the square of the others' share."""


def train_ltx(root: Path) -> LTXConditionPipeline:
    """Every component, trained where `root` does not hold it already."""
    folder = root / "ltx"
    vae = train_ltx_vae(folder)
    tokenizer, text_encoder = train_t5(folder, VIDEO_STEPS)
    pipeline = LTXConditionPipeline(
        transformer=untrained(vae.config.latent_channels),
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return train_transformer(pipeline, STEPS, folder)


def train_ltx_further(begun: Path, steps: int, root: Path) -> LTXConditionPipeline:
    """The pipeline that lies in `begun`, its transformer trained for so many steps more."""
    pipeline = LTXConditionPipeline.from_pretrained(begun, dtype=torch.float32)
    done = len(pipeline.transformer.transformer_blocks)
    pipeline.transformer = deepened(pipeline.transformer, "num_layers", at=done, count=BLOCKS)
    return train_transformer(pipeline, steps, root / "ltx", further=True)


def untrained(latent_channels: int) -> LTXVideoTransformer3DModel:
    torch.manual_seed(22)
    return LTXVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=BLOCKS,
        caption_channels=WIDTH,
    ).to(device())


def train_transformer(
    pipeline: LTXConditionPipeline, steps: int, folder: Path, further: bool = False
) -> LTXConditionPipeline:
    """The same pipeline; `further`, at a lower rate and on all that there is from the start."""
    for part in (pipeline.vae, pipeline.text_encoder):
        part.to(device()).eval().requires_grad_(False)
    transformer = pipeline.transformer.to(device())
    hinted = Hinted(transformer, transformer.transformer_blocks[1:3], 128).to(device())
    pools: dict[tuple[tuple[int, int, int], int], Pool] = {}

    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        kind = kind_of(random, 1 if further else step / steps)
        if kind not in pools:
            pools[kind] = Pool(pipeline.vae, *kind, random)
        return loss(hinted, pipeline, pools[kind], random)

    name, rate = ("ltx_further", FURTHER_RATE) if further else ("ltx", 6e-3)
    pipeline.transformer = learn(name, hinted, loss_of, steps, rate, folder, muon=True).transformer
    return pipeline


def kind_of(random: Random, done: float) -> tuple[tuple[int, int, int], int]:
    """What a batch is of, and how many of its latent frames are known: at first, single frames, then one shape."""
    chance = random.random()
    if done < 0.15 or chance < (0.45 if done < 0.4 else 0.08):
        return STILL, 0
    if chance < 0.68 or done < 0.4:
        return CLIP, int(chance > (0.54 if done < 0.4 else 0.42))
    shape = random.choice(SHAPES)
    return shape, random.choice((0, 0, 1, CONTEXT, CONTEXT)) if shape[0] > CONTEXT + 1 else random.choice((0, 0, 1))


class Pool:
    """Clips of one shape with their packed latents, (count, frames x rows x columns, channels), normalised."""

    def __init__(self, vae: AutoencoderKLLTXVideo, shape: tuple[int, int, int], known: int, random: Random) -> None:
        self.vae = copy.deepcopy(vae).to(fastest())
        self.shape, self.known = shape, known
        drawn = [self.draw(random) for _ in range(POOLS.get((shape, known), POOL) // DRAWN)]
        self.scenes = [scene for scenes, _, _ in drawn for scene in scenes]
        self.latents, self.cells = (torch.cat(each) for each in list(zip(*drawn, strict=True))[1:])

    @torch.no_grad()
    def draw(self, random: Random) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
        """Scenes, their latents, and what they cover of the latents' cells."""
        frames, rows, columns = self.shape
        scenes, clips, cells = clips_to_learn_from(
            DRAWN, random, columns * 16, rows * 16, range(0, 8 * frames - 7, 8), self.known, self.known > 1, 16 // CELLS
        )
        latents = self.vae.encode(clips.to(device(), self.vae.dtype)).latent_dist.mode().float()
        latents = LTXConditionPipeline._normalize_latents(latents, self.vae.latents_mean, self.vae.latents_std)
        return scenes, LTXConditionPipeline._pack_latents(latents.float()), cells.to(device())

    def some(self, random: Random) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
        if self.shape == STILL or random.random() < 0.1:
            at = random.randrange(0, len(self.scenes), DRAWN)
            drawn = slice(at, at + DRAWN)
            self.scenes[drawn], self.latents[drawn], self.cells[drawn] = self.draw(random)
        chosen = random.sample(range(len(self.scenes)), min(TOKENS // self.latents.shape[1], 40, len(self.scenes)))
        return [self.scenes[n] for n in chosen], self.latents[chosen], self.cells[chosen]

    def coordinates(self, count: int, fps: int) -> torch.Tensor:
        """As the pipeline tells them: (count, 3, tokens), seconds and pixels."""
        ids = LTXConditionPipeline._prepare_video_ids(count, *self.shape, device=device())
        coordinates = LTXConditionPipeline._scale_video_ids(ids, 16, 8, 0, device()).float()
        coordinates[:, 0] /= fps
        return coordinates


def loss(hinted: Hinted, pipeline: LTXConditionPipeline, pool: Pool, random: Random) -> torch.Tensor:
    """Of the predicted velocity where nothing is known: in all of a clip, or after its first latents. And the hints."""
    scenes, latents, cells = pool.some(random)
    count, tokens, _ = latents.shape
    share = noise_shares(count)[:, None].to(latents.device)
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, share[..., None])
    unknown = torch.arange(tokens, device=latents.device) >= pool.known * tokens // pool.shape[0]
    seen = latents + CONDITION_NOISE * share[..., None].square() * torch.randn_like(latents)
    embeds, mask = embedded(pipeline, [prompt(scene, random, pool.known > 1) for scene in scenes])
    with hinted.listening() as heard:
        predicted = hinted.transformer(
            hidden_states=torch.where(unknown[:, None], noisy, seen),
            encoder_hidden_states=embeds,
            timestep=torch.where(unknown, share, 0.0) * 1000,
            encoder_attention_mask=mask,
            video_coords=pool.coordinates(count, random.choice(FPS)),
            return_dict=False,
        )[0]
    off = (predicted.float() - (noise - latents)).square().mean(dim=-1)
    return (off * weights_of(latents))[:, unknown].mean() + hinted.loss(heard, cells)


@torch.no_grad()
def embedded(pipeline: LTXConditionPipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's states (count, TOKENS, width) and which of them count, as the pipeline has them."""
    tokens = tokens_of(pipeline.tokenizer, texts)
    return pipeline.text_encoder(tokens.input_ids, tokens.attention_mask)[0].float(), tokens.attention_mask
