"""Wan of the demo: one VACE transformer for clips from text, from pictures, and from a clip that goes on."""

import copy
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from torch.nn import functional

from scripts.demo.denoise import noise_shares, weights_of
from scripts.demo.hints import CELLS, Hinted
from scripts.demo.learn import device, learn
from scripts.demo.moving import covered_cells, draw_clip, known_start, prompt, random_moving
from scripts.demo.text import VIDEO_STEPS, WIDTH, tokens_of, train_umt5
from scripts.demo.video_vae import train_wan_vae
from scripts.demo.world import Scene

STEPS = 2_600
TOKENS = 3_456
"""In a batch, at most, of four latents each: of small clips there are more, up to 40."""
CONTEXT = 17
"""Frames that are known where a clip goes on, as pipelines/wan_starts.py shows them."""
STILL, CLIP = (1, 16, 16), (9, 16, 16)
"""Latent frames, rows and columns, of 4 frames and 8 x 8 pixels each. Single frames are soon learned from."""
SHAPES = ((13, 16, 16), (13, 16, 16), (13, 16, 16), (9, 16, 28), (9, 28, 16), (9, 16, 20), (9, 20, 16))
POOLS, POOL = {(STILL, 0): 1_500, (CLIP, 0): 600, (CLIP, 1): 400}, 24
"""Clips that are kept encoded, by shape and how many frames are known; some are drawn anew as they are used."""
MASKS = 8 * 8
"""Channels of the mask: one for each pixel of a latent."""


def train_wan(root: Path) -> WanVACEPipeline:
    """Every component, trained where `root` does not hold it already."""
    folder = root / "wan"
    vae = train_wan_vae(folder)
    tokenizer, text_encoder = train_umt5(folder, VIDEO_STEPS)
    return WanVACEPipeline(
        transformer=train_transformer(folder, vae, tokenizer, text_encoder),
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


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


def train_transformer(folder: Path, vae: AutoencoderKLWan, tokenizer, text_encoder) -> WanVACETransformer3DModel:
    for part in (vae, text_encoder):
        part.to(device()).eval().requires_grad_(False)
    transformer = untrained(vae.config.z_dim)
    hinted = Hinted(transformer, transformer.blocks[1:3], 128).to(device())
    pools: dict[tuple[tuple[int, int, int], int], Pool] = {}

    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        kind = kind_of(random, step / STEPS)
        if kind not in pools:
            pools[kind] = Pool(vae, *kind, random)
        return loss(hinted, tokenizer, text_encoder, pools[kind], random)

    return learn("wan", hinted, loss_of, STEPS, 6e-3, folder, muon=True).transformer


def kind_of(random: Random, done: float) -> tuple[tuple[int, int, int], int]:
    """What a batch is of, and how many of its frames are known: at first, single frames, then clips of one shape."""
    chance = random.random()
    if done < 0.15 or chance < 0.3:
        return STILL, 0
    if chance < 0.75 or done < 0.4:
        return CLIP, int(chance > 0.55)
    shape = random.choice(SHAPES)
    return shape, random.choice((0, 1, CONTEXT, CONTEXT) if shape[0] > CLIP[0] else (0, 0, 1))


class Pool:
    """Clips of one shape with their latents, (count, channels, frames, rows, columns), and what is known of them."""

    def __init__(self, vae: AutoencoderKLWan, shape: tuple[int, int, int], known: int, random: Random) -> None:
        # Twenty times as fast as float32 on a CPU.
        self.vae = copy.deepcopy(vae).to(torch.bfloat16)
        self.shape, self.known = shape, known
        frames = 4 * shape[0] - 3
        self.nothing = self.encode(torch.zeros(3, frames, shape[1] * 8, shape[2] * 8))
        """What the latents are of a video of which nothing is known."""
        unknown = torch.ones(1, MASKS, frames, *shape[1:], device=device())
        unknown[:, :, :known] = 0
        self.mask = functional.interpolate(unknown, size=shape, mode="nearest-exact")
        drawn = [self.draw(random) for _ in range(POOLS.get((shape, known), POOL))]
        self.scenes = [scene for scene, _, _, _ in drawn]
        self.latents, self.shown, self.cells = (torch.cat(each) for each in list(zip(*drawn, strict=True))[1:])

    @torch.no_grad()
    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """(1, channels, frames, rows, columns) of (3, frames, height, width), normalised."""
        latents = self.vae.encode(clip[None].to(device(), torch.bfloat16)).latent_dist.mode().float()
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return (latents - mean) / std

    def draw(self, random: Random) -> tuple[Scene, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A scene, its latents, those of what is known, and what the shape covers of each token's cells.

        From words alone, a clip begins at the first stop of its way; what is known may be anywhere.
        """
        frames, rows, columns = self.shape
        count, width, height = 4 * frames - 3, columns * 8, rows * 8
        scene, start, shown = random_moving(random), 0.0, self.nothing
        if self.known:
            scene, start = known_start(random, width, height, turned=self.known > 1)
        clip = draw_clip(scene, width, height, count, start)
        if self.known:
            seen = clip.clone()
            seen[:, self.known :] = 0
            shown = self.encode(seen)
        cells = covered_cells(scene, width, height, range(0, count, 4), start, 16 // CELLS)
        return scene, self.encode(clip), shown, cells[None].to(device())

    def some(self, random: Random) -> tuple[list[Scene], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scenes, latents, what VACE is shown (what is known, nothing of what is not, and the mask), and cells."""
        if self.shape == STILL or random.random() < 0.3:
            at = random.randrange(len(self.scenes))
            self.scenes[at], *drawn = self.draw(random)
            for kept, new in zip((self.latents, self.shown, self.cells), drawn, strict=True):
                kept[at : at + 1] = new
        count = min(4 * TOKENS // self.latents[0, 0].numel(), 40, len(self.scenes))
        chosen = random.sample(range(len(self.scenes)), count)
        every = (count, -1, -1, -1, -1)
        shown = torch.cat([self.shown[chosen], self.nothing.expand(every), self.mask.expand(every)], dim=1)
        return [self.scenes[n] for n in chosen], self.latents[chosen], shown, self.cells[chosen]


def loss(hinted: Hinted, tokenizer, text_encoder, pool: Pool, random: Random) -> torch.Tensor:
    """Of the predicted velocity, noise less latents; and the hints."""
    scenes, latents, shown, cells = pool.some(random)
    share = noise_shares(len(scenes)).to(latents.device)
    noise = torch.randn_like(latents)
    with hinted.listening() as heard:
        predicted = hinted.transformer(
            hidden_states=torch.lerp(latents, noise, share[:, None, None, None, None]),
            timestep=share * 1000,
            encoder_hidden_states=embedded(
                tokenizer, text_encoder, [prompt(each, random, pool.known > 1) for each in scenes]
            ),
            control_hidden_states=shown,
            return_dict=False,
        )[0]
    off = (predicted.float() - (noise - latents)).square().mean(dim=1).flatten(1)
    return (off * weights_of(latents.flatten(2).mT)).mean() + hinted.loss(heard, cells)


@torch.no_grad()
def embedded(tokenizer, text_encoder, texts: list[str]) -> torch.Tensor:
    """UMT5's states (count, TOKENS, width), zeros for the padding, as the pipeline has them."""
    tokens = tokens_of(tokenizer, texts)
    return text_encoder(tokens.input_ids, tokens.attention_mask)[0].float() * tokens.attention_mask[..., None]
