"""Flux's VAE of the demo: AutoencoderKL with the 16 channels of the real one, but 16 x 16 pixels to a latent.

The real one takes 8 x 8. Twice that makes a quarter of the tokens: what lets two CPU cores train and run the rest.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from scripts.demo.scenes import draw, draw_batch, random_scene, rgb
from scripts.demo.training import device, learn

SIDE = 256
STEPS, SHARPEN_STEPS = 2_000, 2_400


def train_image_vae(folder: Path, steps: int = STEPS) -> AutoencoderKL:
    """Trained, with the scaling and shift that make its latents have mean 0 and deviation 1."""
    torch.manual_seed(10)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(16, 32, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device())
    start(vae, vae.encoder.conv_out, 16)

    def loss_of(step: int) -> torch.Tensor:
        pixels = pictures(Random(step), step / steps).to(device())
        return rebuilding(vae, pixels)

    vae = learn("image_vae", vae, loss_of, steps, 2e-3, folder)
    vae = sharpen("image_decoder", vae, lambda random, done: pictures(random, 0.5 + done / 2), SHARPEN_STEPS, folder)
    with torch.inference_mode():
        random = Random(-1)
        pixels = draw_batch([random_scene(random) for _ in range(64)], SIDE, SIDE).to(device())
        latents = torch.cat([vae.encode(some).latent_dist.mode() for some in pixels.split(8)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae


def sharpen(name: str, vae: Any, pictures: Callable[[Random, float], torch.Tensor], steps: int, folder: Path) -> Any:
    """The same VAE with a decoder that learned on alone; its latents stay as they are."""
    vae.requires_grad_(True)
    frozen = [part for part in (vae.encoder, getattr(vae, "quant_conv", None)) if part is not None]
    for part in frozen:
        part.requires_grad_(False)

    def loss_of(step: int) -> torch.Tensor:
        pixels = pictures(Random(1_000_000 + step), step / steps).to(device())
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample()
        off = (vae.decode(latents).sample.float() - pixels).abs()
        return off.mean() + 0.5 * off.square().mean()

    return learn(name, vae, loss_of, steps, 1.5e-3, folder)


def rebuilding(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The loss of a VAE: how far off it is, with latents that stay near 0."""
    latents = vae.encode(pixels).latent_dist
    off = (vae.decode(latents.sample()).sample.float() - pixels).abs()
    return off.mean() + 0.5 * off.square().mean() + 1e-4 * latents.mean.float().square().mean()


def start(vae: nn.Module, last: nn.Module, channels: int) -> None:
    """First weights that let pictures through: with the classes' own, thousands of steps pass before colours do.

    Every convolution keeps the variance of what it is given, and a residual adds a third. The encoder's last channels
    tell the latents' log variance: small everywhere, or the first steps are all noise.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if "conv2" in name:
                with torch.no_grad():
                    module.weight *= 0.3
    with torch.no_grad():
        last.weight[channels:] = 0
        last.bias[channels:] = -5


def pictures(random: Random, done: float) -> torch.Tensor:
    """Mostly pieces of 64 pixels; towards the end whole pictures, since group norms see the whole."""
    if done > 0.75 and random.random() < 0.5:
        return torch.stack([picture(random, SIDE) for _ in range(2)])
    if done > 0.3 and random.random() < 0.3:
        return torch.stack([picture(random, 128) for _ in range(4)])
    return torch.stack([piece(picture(random, random.choice((64, 96, SIDE))), random) for _ in range(16)])


def picture(random: Random, side: int) -> torch.Tensor:
    """One of the world, often in colours that have no name there, so that other pictures survive encoding too."""
    scene = random_scene(random)
    drawn = draw(scene, side, side)
    chance = random.random()
    if chance < 0.6:
        return drawn
    inside = draw(replace(scene, colour="black", background="white"), side, side)
    inside = (rgb("white")[0] - inside[:1]) / (rgb("white")[0] - rgb("black")[0])
    front, back = (torch.rand(3, 1, 1) * 2 - 1 for _ in range(2))
    if chance < 0.75:  # a background that changes from side to side
        other = torch.rand(3, 1, 1) * 2 - 1
        along = torch.linspace(0, 1, side)
        back = torch.lerp(back, other, along[None, None, :] if random.random() < 0.5 else along[None, :, None])
    return torch.lerp(back.expand_as(drawn), front.expand_as(drawn), inside)


def piece(whole: torch.Tensor, random: Random, side: int = 64) -> torch.Tensor:
    """A square of it, most often one with an edge in it."""
    room = whole.shape[-1] - side
    for _ in range(6):
        top, left = random.randint(0, room), random.randint(0, room)
        part = whole[:, top : top + side, left : left + side]
        if part.std(dim=(1, 2)).amax() > 0.05:
            break
    return part
