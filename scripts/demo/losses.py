"""What the losses of the demo's transformers have in common: how much noise, and which tokens matter."""

import torch


def noise_shares(count: int) -> torch.Tensor:
    """(count,), half of them near 1: what is hard, which shape and where, is decided while there is little else."""
    usual = torch.sigmoid(torch.randn(count) * 1.2 + 0.3)
    return torch.where(torch.rand(count) < 0.5, 0.85 + 0.15 * torch.rand(count), usual)


def weights_of(latents: torch.Tensor) -> torch.Tensor:
    """Of each token in the loss, (count, tokens): more for those that a shape is in."""
    background = latents.median(dim=1, keepdim=True).values
    return weights_of_some((latents - background).square().mean(dim=-1) > 0.05)


def weights_of_some(chosen: torch.Tensor) -> torch.Tensor:
    """Of (count, tokens): the chosen ones gain three quarters of the whole, however few they are."""
    some = chosen.float()
    return 1 + 0.75 * some.shape[1] * some / some.sum(dim=1, keepdim=True).clamp(min=1)
