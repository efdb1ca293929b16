"""Flux of the demo: one transformer for pictures from text, from a picture, and for Kontext's edits."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from scripts.demo.auxiliary_losses import CELLS, Hinted
from scripts.demo.grow import deepened
from scripts.demo.image_vae import train_image_vae
from scripts.demo.losses import noise_shares, weights_of
from scripts.demo.prompts import describe, instruct, strange
from scripts.demo.scenes import (
    ATTRIBUTES,
    COLOURS,
    Scene,
    covered_cells,
    draw_still,
    edited,
    nameless_colour,
    random_scene,
)
from scripts.demo.text_encoders import TOKENS, WIDTH, tokens_of, train_clip, train_t5
from scripts.demo.training import FURTHER_RATE, device, fastest, learn

STEPS = 16_000
BATCH = 32
SQUARE = (8, 8)
GRIDS = ((8, 10), (10, 8), (8, 12), (12, 8), (8, 14), (14, 8), (8, 18), (18, 8))
"""Rows and columns of tokens of 32 x 32 pixels: even, so that a picture's centre is a corner of four."""
SQUARE_POOL, POOL = 3_000, 240
"""Edits kept encoded for each grid; some are drawn anew as they are used, and they are turned around, too."""
NAMELESS = 0.25
"""Of the edits, from pictures in colours without a name; the pictures are not learned, only what they show."""
BLOCKS, NAMING = 4, 1
"""Blocks with streams of their own for words and pictures. By the end of the second, counted from 0, the words are to
have learned from Kontext's picture what they do not name themselves."""


def train_flux(root: Path) -> FluxPipeline:
    """Every component, trained where `root` does not hold it already."""
    folder = root / "flux"
    vae = train_image_vae(folder)
    tokenizer, text_encoder = train_clip(root / "text")
    tokenizer_2, text_encoder_2 = train_t5(root / "text")
    pipeline = FluxPipeline(
        transformer=untrained(vae.config.latent_channels),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        # What Black Forest Labs publish for dev: the noise is shifted by resolution.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    return train_transformer(pipeline, STEPS, folder)


def train_flux_further(begun: Path, steps: int, root: Path) -> FluxPipeline:
    """The pipeline that lies in `begun`, its transformer trained for so many steps more."""
    pipeline = FluxPipeline.from_pretrained(begun, dtype=torch.float32)
    pipeline.transformer = deepened(pipeline.transformer, "num_layers", at=0, count=BLOCKS)
    return train_transformer(pipeline, steps, root / "flux", further=True)


def untrained(latent_channels: int) -> FluxTransformer2DModel:
    torch.manual_seed(14)
    return FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=BLOCKS,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    ).to(device())


def train_transformer(pipeline: FluxPipeline, steps: int, folder: Path, further: bool = False) -> FluxPipeline:
    """The same pipeline; `further`, at a lower rate and on all that there is from the start."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.to(device()).eval().requires_grad_(False)
    transformer = pipeline.transformer.to(device())
    blocks = (transformer.transformer_blocks[-1], transformer.single_transformer_blocks[0])
    hinted = Hinted(transformer, blocks, 128, naming=transformer.transformer_blocks[NAMING]).to(device())
    pools: dict[tuple[int, int], Pool] = {}

    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        at_first = not further and step < steps / 2
        grid = SQUARE if at_first or random.random() < (0.7 if further else 0.5) else random.choice(GRIDS)
        if grid not in pools:
            pools[grid] = Pool(pipeline.vae, grid, SQUARE_POOL if grid == SQUARE else POOL, random)
        return loss(hinted, pipeline, pools[grid], random, looks=random.random() < (0.7 if further else 0.2))

    name, rate = ("flux_further", FURTHER_RATE) if further else ("flux", 6e-3)
    pipeline.transformer = learn(name, hinted, loss_of, steps, rate, folder, muon=True).transformer
    return pipeline


@dataclass(frozen=True)
class Edit:
    """Two scenes, and the attribute that differs."""

    before: Scene
    name: str
    after: Scene

    @property
    def named(self) -> bool:
        return {self.before.colour, self.before.background, self.after.colour, self.after.background} <= {*COLOURS}

    @property
    def can_turn(self) -> bool:
        """No words ask for something medium, or for a colour that has no name."""
        asked = getattr(self.before, self.name)
        return asked in ATTRIBUTES[self.name] and asked != "medium"

    def turned(self) -> "Edit":
        return Edit(self.after, self.name, self.before)


class Pool:
    """Edits with the packed latents of both pictures, each (count, rows x columns, 4 x channels)."""

    def __init__(self, vae: AutoencoderKL, grid: tuple[int, int], count: int, random: Random) -> None:
        self.vae = copy.deepcopy(vae).to(fastest()).to(memory_format=torch.channels_last)
        self.grid = grid
        self.edits = [random_edit(random) for _ in range(count)]
        self.before, self.after = self.encoded(self.edits)

    def encoded(self, edits: list[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode([each.before for each in edits]), self.encode([each.after for each in edits])

    @torch.no_grad()
    def encode(self, scenes: list[Scene]) -> torch.Tensor:
        rows, columns = self.grid
        packed = []
        for n in range(0, len(scenes), 16):
            drawn = [draw_still(scene, columns * 32, rows * 32) for scene in scenes[n : n + 16]]
            pixels = torch.stack(drawn).to(device(), self.vae.dtype)
            pixels = pixels.to(memory_format=torch.channels_last)
            latents = self.vae.encode(pixels).latent_dist.mode().float()
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
            packed.append(FluxPipeline._pack_latents(latents, *latents.shape))
        return torch.cat(packed)

    def some(self, count: int, random: Random, named: bool = False) -> tuple[list[Edit], torch.Tensor, torch.Tensor]:
        """Edits and the latents of their pictures; if they are to be `named`, without nameless colours."""
        if random.random() < 0.2:
            at = random.randrange(len(self.edits))
            self.edits[at] = random_edit(random)
            self.before[at : at + 1], self.after[at : at + 1] = self.encoded(self.edits[at : at + 1])
        chosen = random.sample([n for n, each in enumerate(self.edits) if each.named or not named], count)
        edits, before, after = [self.edits[n] for n in chosen], self.before[chosen], self.after[chosen]
        turned = torch.tensor([random.random() < 0.5 and each.can_turn for each in edits], device=device())
        edits = [each.turned() if turn else each for each, turn in zip(edits, turned, strict=True)]
        turned = turned[:, None, None]
        return edits, torch.where(turned, after, before), torch.where(turned, before, after)

    def cells(self, scenes: list[Scene]) -> torch.Tensor:
        """(count, 1, rows x CELLS, columns x CELLS): what the shape covers of each."""
        rows, columns = self.grid
        covered = [covered_cells(scene, columns * 32, rows * 32, 32 // CELLS) for scene in scenes]
        return torch.stack(covered)[:, None].to(device())

    def places(self, picture: int) -> torch.Tensor:
        """As FluxPipeline numbers tokens: (rows x columns, 3), the first number 1 for what Kontext looks at."""
        rows, columns = self.grid
        ids = torch.zeros(rows, columns, 3)
        ids[..., 0] = picture
        ids[..., 1] = torch.arange(rows)[:, None]
        ids[..., 2] = torch.arange(columns)[None, :]
        return ids.flatten(0, 1).to(device())


def random_edit(random: Random) -> Edit:
    """Of small shapes there are more: what they are is learned last.

    Some are in colours without a name, all but the one that is asked for: what a shape is does not hang on its colour.
    """
    before = random_scene(random)
    if random.random() < 0.25:
        before = replace(before, size="small")
    edit = Edit(before, *edited(before, random))
    if random.random() < NAMELESS:
        colour = nameless_colour(random)
        colours = {"colour": colour, "background": nameless_colour(random, unlike=(colour,))}
        kept = {name: value for name, value in colours.items() if name != edit.name}
        edit = Edit(replace(before, **colours), edit.name, replace(edit.after, **kept))
    return edit


def loss(hinted: Hinted, pipeline: FluxPipeline, pool: Pool, random: Random, looks: bool) -> torch.Tensor:
    """Of the velocity, noise less latents, and the hints: from a description, or from a picture and an instruction."""
    edits, before, after = pool.some(BATCH, random, named=not looks)
    scenes = [each.after for each in edits]
    sane = [looks or random.random() > 0.04 for _ in scenes]
    if looks:
        texts = [instruct(each.before, each.name, getattr(each.after, each.name), random) for each in edits]
    else:
        if random.random() < 0.5:
            scenes, after = [each.before for each in edits], before
        texts = [
            describe(each, random)[0] if said else strange(random) for each, said in zip(scenes, sane, strict=True)
        ]
    noise = torch.randn_like(after)
    share = noise_shares(BATCH)[:, None, None].to(after.device)
    noisy = torch.lerp(after, noise, share)
    tokens, ids = noisy, pool.places(0)
    if looks:
        tokens, ids = torch.cat([noisy, before], dim=1), torch.cat([ids, pool.places(1)])
    embeds, pooled = embedded(pipeline, texts)
    with hinted.listening() as heard, hinted.listening_to_words() as words:
        predicted = hinted.transformer(
            hidden_states=tokens,
            timestep=share[:, 0, 0],
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(TOKENS, 3, device=after.device),
            img_ids=ids,
            return_dict=False,
        )[0][:, : after.shape[1]]
    off = (predicted.float() - (noise - after)).square().mean(dim=-1)
    learned = torch.tensor([each.named for each in edits], device=after.device)
    named = hinted.naming_loss(words, scenes, torch.tensor(sane, device=after.device))
    velocity = ((off * weights_of(after)).mean(dim=1) * learned).mean()
    return velocity + hinted.loss(heard, pool.cells(scenes)) + named


@torch.no_grad()
def embedded(pipeline: FluxPipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's states (count, TOKENS, width), padding among them as in FluxPipeline, and CLIP's pooled ones."""
    pooled = pipeline.text_encoder(tokens_of(pipeline.tokenizer, texts).input_ids).pooler_output
    return pipeline.text_encoder_2(tokens_of(pipeline.tokenizer_2, texts).input_ids)[0].float(), pooled.float()
