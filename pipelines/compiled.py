"""A denoiser's blocks as torch.compile makes them: the same arithmetic, in fewer passes over memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKEND = "inductor"


@contextmanager
def compiled(denoiser: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """While inside, and if `wanted`, its repeated blocks are compiled: the first of a kind for all.

    Only what a block computes is: the hooks that bring its weights stay outside, and weights are inputs, so that it
    holds in every tier and wherever they move; and for any size. What was compiled is kept by torch for as long as the
    process lives. On CUDA and CPU alike it takes a C compiler.
    """
    blocks = repeated_blocks(denoiser) if wanted else []
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=BACKEND)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def repeated_blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that diffusers names for `compile_repeated_blocks`."""
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    return [module for module in denoiser.modules() if type(module).__name__ in names]
