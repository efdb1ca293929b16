"""Wan of the demo: one VACE transformer for clips from text, from pictures, and from a clip that goes on."""

import copy
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from torch.nn import functional

from scripts.demo.auxiliary_losses import CELLS, Hinted
from scripts.demo.losses import noise_shares, weights_of
from scripts.demo.motion import clips_to_learn_from, prompt
from scripts.demo.scenes import Scene
from scripts.demo.text_encoders import VIDEO_STEPS, WIDTH, tokens_of, train_umt5
from scripts.demo.training import FURTHER_RATE, device, fastest, learn
from scripts.demo.video_vae import train_wan_vae

STEPS = 2_600
TOKENS = 3_456
"""In a batch, at most, of four latents each: of small clips there are more, up to 40."""
CONTEXT = 17
"""Frames that are known where a clip goes on, as pipelines/wan_starts.py shows them."""
STILL, CLIP = (1, 16, 16), (9, 16, 16)
"""Latent frames, rows and columns, of 4 frames and 8 x 8 pixels each. Single frames are soon learned from."""
SHAPES = (*((13, 16, 16),) * 4, (9, 16, 28), (9, 28, 16), (9, 16, 20), (9, 20, 16))
POOLS, POOL = {(STILL, 0): 1_200, (CLIP, 0): 400, (CLIP, 1): 240}, 16
"""Clips that are kept encoded, by shape and how many frames are known; some are drawn anew as they are used."""
DRAWN = 4
"""At a time: on a CPU two or more are encoded in a third of the time that each takes alone."""
MASKS = 8 * 8
"""Channels of the mask: one for each pixel of a latent."""


def train_wan(root: Path) -> WanVACEPipeline:
    """Every component, trained where `root` does not hold it already."""
    folder = root / "wan"
    vae = train_wan_vae(folder)
    tokenizer, text_encoder = train_umt5(folder, VIDEO_STEPS)
    pipeline = WanVACEPipeline(
        transformer=untrained(vae.config.z_dim),
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    return train_transformer(pipeline, STEPS, folder)


def train_wan_further(begun: Path, steps: int, root: Path) -> WanVACEPipeline:
    """The pipeline that lies in `begun`, its transformer trained for so many steps more."""
    pipeline = WanVACEPipeline.from_pretrained(begun, dtype=torch.float32)
    return train_transformer(pipeline, steps, root / "wan", further=True)


def untrained(latent_channels: int) -> WanVACETransformer3DModel:
    torch.manual_seed(32)
    return WanVACETransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=2 * latent_channels + MASKS,
    ).to(device())


def train_transformer(pipeline: WanVACEPipeline, steps: int, folder: Path, further: bool = False) -> WanVACEPipeline:
    """The same pipeline; `further`, at a lower rate and on all that there is from the start."""
    for part in (pipeline.vae, pipeline.text_encoder):
        part.to(device()).eval().requires_grad_(False)
    transformer = pipeline.transformer.to(device())
    hinted = Hinted(transformer, transformer.blocks[1:3], 128).to(device())
    pools: dict[tuple[tuple[int, int, int], int], Pool] = {}

    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        kind = kind_of(random, 1 if further else step / steps)
        if kind not in pools:
            pools[kind] = Pool(pipeline.vae, *kind, random)
        return loss(hinted, pipeline, pools[kind], random)

    name, rate = ("wan_further", FURTHER_RATE) if further else ("wan", 6e-3)
    pipeline.transformer = learn(name, hinted, loss_of, steps, rate, folder, muon=True).transformer
    return pipeline


def kind_of(random: Random, done: float) -> tuple[tuple[int, int, int], int]:
    """What a batch is of, and how many of its frames are known: at first, single frames, then clips of one shape."""
    chance = random.random()
    if done < 0.15 or chance < (0.45 if done < 0.4 else 0.08):
        return STILL, 0
    if chance < 0.64 or done < 0.4:
        return CLIP, int(chance > (0.54 if done < 0.4 else 0.35))
    shape = random.choice(SHAPES)
    return shape, random.choice((0, 1, CONTEXT, CONTEXT, CONTEXT) if shape[0] > CLIP[0] else (0, 0, 1))


class Pool:
    """Clips of one shape with their latents, (count, channels, frames, rows, columns), and what is known of them."""

    def __init__(self, vae: AutoencoderKLWan, shape: tuple[int, int, int], known: int, random: Random) -> None:
        self.vae = copy.deepcopy(vae).to(fastest())
        self.shape, self.known = shape, known
        frames = 4 * shape[0] - 3
        self.nothing = self.encode(torch.zeros(1, 3, frames, shape[1] * 8, shape[2] * 8))
        """What the latents are of a video of which nothing is known."""
        unknown = torch.ones(1, MASKS, frames, *shape[1:], device=device())
        unknown[:, :, :known] = 0
        self.mask = functional.interpolate(unknown, size=shape, mode="nearest-exact")
        drawn = [self.draw(random) for _ in range(POOLS.get((shape, known), POOL) // DRAWN)]
        self.scenes = [scene for scenes, _, _, _ in drawn for scene in scenes]
        self.latents, self.shown, self.cells = (torch.cat(each) for each in list(zip(*drawn, strict=True))[1:])

    @torch.no_grad()
    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """(count, channels, frames, rows, columns) of (count, 3, frames, height, width), normalised."""
        latents = self.vae.encode(clips.to(device(), self.vae.dtype)).latent_dist.mode().float()
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return (latents - mean) / std

    def draw(self, random: Random) -> tuple[list[Scene], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scenes, their latents, those of what is known, and what the shape covers of each token's cells."""
        frames, rows, columns = self.shape
        scenes, clips, cells = clips_to_learn_from(
            DRAWN, random, columns * 8, rows * 8, range(0, 4 * frames - 3, 4), self.known, self.known > 1, 16 // CELLS
        )
        latents, shown = self.encode(clips), self.nothing.expand(DRAWN, -1, -1, -1, -1)
        if self.known:
            clips[:, :, self.known :] = 0
            shown = self.encode(clips)
        return scenes, latents, shown, cells.to(device())

    def some(self, random: Random) -> tuple[list[Scene], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scenes, latents, what VACE is shown (what is known, nothing of what is not, and the mask), and cells."""
        if self.shape == STILL or random.random() < 0.1:
            at = random.randrange(0, len(self.scenes), DRAWN)
            drawn = slice(at, at + DRAWN)
            self.scenes[drawn], self.latents[drawn], self.shown[drawn], self.cells[drawn] = self.draw(random)
        count = min(4 * TOKENS // self.latents[0, 0].numel(), 40, len(self.scenes))
        chosen = random.sample(range(len(self.scenes)), count)
        every = (count, -1, -1, -1, -1)
        shown = torch.cat([self.shown[chosen], self.nothing.expand(every), self.mask.expand(every)], dim=1)
        return [self.scenes[n] for n in chosen], self.latents[chosen], shown, self.cells[chosen]


def loss(hinted: Hinted, pipeline: WanVACEPipeline, pool: Pool, random: Random) -> torch.Tensor:
    """Of the predicted velocity, noise less latents; and the hints."""
    scenes, latents, shown, cells = pool.some(random)
    share = noise_shares(len(scenes)).to(latents.device)
    noise = torch.randn_like(latents)
    with hinted.listening() as heard:
        predicted = hinted.transformer(
            hidden_states=torch.lerp(latents, noise, share[:, None, None, None, None]),
            timestep=share * 1000,
            encoder_hidden_states=embedded(pipeline, [prompt(each, random, pool.known > 1) for each in scenes]),
            control_hidden_states=shown,
            return_dict=False,
        )[0]
    off = (predicted.float() - (noise - latents)).square().mean(dim=1).flatten(1)
    return (off * weights_of(latents.flatten(2).mT)).mean() + hinted.loss(heard, cells)


@torch.no_grad()
def embedded(pipeline: WanVACEPipeline, texts: list[str]) -> torch.Tensor:
    """UMT5's states (count, TOKENS, width), zeros for the padding, as the pipeline has them."""
    tokens = tokens_of(pipeline.tokenizer, texts)
    return pipeline.text_encoder(tokens.input_ids, tokens.attention_mask)[0].float() * tokens.attention_mask[..., None]
