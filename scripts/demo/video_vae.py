"""LTX's and Wan's VAEs of the demo: trained on pieces of clips in which a shape moves, and of still pictures.

The blocks are those of LTX 0.9.5 and of Wan 2.2, whose shortcuts around every change of resolution let pictures through
early. A latent of Wan's takes 8 x 8 pixels, as it should, one of LTX's 16 x 16, where the real one takes 32 x 32.
"""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan
from torch.nn import functional

from scripts.demo.image_vae import piece, start
from scripts.demo.motion import draw_clip, random_moving, random_start
from scripts.demo.scenes import LATTICE
from scripts.demo.training import device, learn

LTX_STEPS, WAN_STEPS = 5_000, 2_600
SIDE, PIECE = 128, 64
"""Of the clips that pieces are cut from, and of the pieces."""
DIVERGENCE, UNLIKE = 1e-3, 0.1
BATCHES = {1: 24, 9: 4, 17: 2, 33: 1}
"""Pieces by their frames. Wan's VAE remembers all that came before: shown no more than nine, it fades after them."""


def train_ltx_vae(folder: Path) -> AutoencoderKLLTXVideo:
    torch.manual_seed(20)
    vae = AutoencoderKLLTXVideo(
        latent_channels=48,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("LTXVideo095DownBlock3D",) * 3,
        downsample_type=("spatiotemporal",) * 3,
        layers_per_block=(1,) * 4,
        spatio_temporal_scaling=(True,) * 3,
        decoder_block_out_channels=(24, 48, 48),
        decoder_layers_per_block=(1,) * 4,
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(True,) * 3,
        upsample_factor=(1, 2, 1),
        patch_size=2,
    ).to(device())
    start(vae, vae.encoder.conv_out.conv, 48)
    vae = train("ltx_vae", vae, folder, LTX_STEPS, (1, 9, 17))
    mean, std = statistics(vae)
    vae.latents_mean.copy_(mean)
    vae.latents_std.fill_(std)
    return vae


def train_wan_vae(folder: Path) -> AutoencoderKLWan:
    torch.manual_seed(30)
    vae = AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
    ).to(device())
    start(vae, vae.quant_conv, 16)
    vae = train("wan_vae", vae, folder, WAN_STEPS, (1, 9, 17, 33))
    mean, std = statistics(vae)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=[std] * len(mean))
    return vae


def train(name: str, vae: Any, folder: Path, steps: int, lengths: tuple[int, ...]) -> Any:
    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        return loss(vae, pieces(random, random.choice(lengths)).to(device()))

    return learn(name, vae, loss_of, steps, 2e-3, folder, muon=True)


def pieces(random: Random, count: int) -> torch.Tensor:
    """(batch, 3, count, PIECE, PIECE)."""
    clips = [clip(random, count) for _ in range(BATCHES[count])]
    return torch.stack([piece(each.flatten(0, 1), random, PIECE).unflatten(0, (3, count)) for each in clips])


def clip(random: Random, count: int) -> torch.Tensor:
    """(3, count, SIDE, SIDE): half of them on the lattice, as clips of the demo are, and half anywhere."""
    scene = random_moving(random)
    begin: float = random_start(scene, SIDE, SIDE, random)
    if random.random() < 0.5:
        near = LATTICE / 2
        scene = replace(scene, dx=random.uniform(-near, near), dy=random.uniform(-near, near))
        begin = random.uniform(0, 100)
    return draw_clip(scene, SIDE, SIDE, count, begin)


def loss(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """How far off the pixels are, most of all near edges; and what keeps latents easy to learn for a transformer.

    That is a VAE's usual divergence from a normal distribution, so that they hold nothing that pixels do not need, and
    that all latents of a plain colour are alike. Without, most of what is in them tells how far away the canvas's edges
    are, and a transformer that knows places only from one another cannot foretell it.
    """
    latents = vae.encode(pixels).latent_dist
    off = (vae.decode(latents.sample()).sample.float() - pixels).abs()
    rebuilt = ((1 + 4 * near_edges(pixels)) * (off + 0.5 * off.square())).mean()
    mean, logvar = latents.mean.float(), latents.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    plain = vae.encode((torch.rand(2, 3, 1, 1, 1, device=pixels.device) * 2 - 1).expand(-1, -1, *pixels.shape[2:]))
    unlike = plain.latent_dist.mean.float().var(dim=(2, 3, 4)).mean()
    return rebuilt + DIVERGENCE * divergence + UNLIKE * unlike


def near_edges(pixels: torch.Tensor) -> torch.Tensor:
    """(batch, 1, frames, height, width): 1 within four pixels of a shape's edge, which tells what it is."""
    high, low = (functional.max_pool3d(each, (1, 9, 9), 1, (0, 4, 4)) for each in (pixels, -pixels))
    return ((high + low).amax(dim=1, keepdim=True) > 0.1).float()


@torch.inference_mode()
def statistics(vae: Any) -> tuple[torch.Tensor, float]:
    """The mean of each latent channel, and one deviation for all: what tells little is to stay little."""
    random = Random(-1)
    clips = [clip(random, 17)[None].to(device()) for _ in range(24)]
    latents = torch.cat([vae.encode(each).latent_dist.mode() for each in clips])
    mean = latents.mean(dim=(0, 2, 3, 4))
    return mean, float((latents - mean[:, None, None, None]).square().mean().sqrt())
