"""LTX's VAE of the demo: trained on clips in which a shape moves, on pieces of them, and on still pictures."""

from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo

from scripts.demo.image_vae import piece, rebuilding, start
from scripts.demo.learn import device, learn
from scripts.demo.world import draw_batch, draw_clip, random_moving, random_scene

STEPS = 3_500


def train_ltx_vae(folder: Path) -> AutoencoderKLLTXVideo:
    """As the real one: 32 x 32 pixels and 8 frames to a latent."""
    torch.manual_seed(20)
    vae = AutoencoderKLLTXVideo(
        latent_channels=48,
        block_out_channels=(24, 32, 40, 40),
        decoder_block_out_channels=(24, 32, 40, 40),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    ).to(device())
    start(vae, vae.encoder.conv_out.conv, 48)
    vae = train("ltx_vae", vae, folder, STEPS, (1, 1, 9), 4e-4, torch.float32)
    mean, std = statistics(vae)
    vae.latents_mean.copy_(mean)
    vae.latents_std.copy_(std)
    return vae


def train(
    name: str, vae: Any, folder: Path, steps: int, lengths: tuple[int, ...], rate: float, dtype: torch.dtype
) -> Any:
    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        return rebuilding(vae, pieces(random, random.choice(lengths)).to(device()))

    return learn(name, vae, loss_of, steps, rate, folder, dtype)


def pieces(random: Random, count: int) -> torch.Tensor:
    """(batch, 3, count, height, width): whole pictures and clips, and pieces of larger ones with edges in them."""
    if count == 1:
        side = random.choice((96, 128, 160))
        return draw_batch([random_scene(random) for _ in range(6)], side, side)[:, :, None]
    side, batch = random.choice(((96, 2), (96, 2), (128, 4), (192, 4)))
    clips = [draw_clip(random_moving(random), side, side, count, 24, random.random() * 2) for _ in range(batch)]
    if side == 96:
        return torch.stack(clips)
    return torch.stack([piece(clip.flatten(0, 1), random).unflatten(0, (3, count)) for clip in clips])


@torch.inference_mode()
def statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each latent channel."""
    random = Random(-1)
    clips = [draw_clip(random_moving(random), 192, 192, 17, 16, random.random() * 2)[None] for _ in range(16)]
    latents = torch.cat([vae.encode(clip.to(device())).latent_dist.mode() for clip in clips])
    return latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
