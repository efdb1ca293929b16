"""Decoding in tiles: a fraction of the memory, and pixels that differ along the seams by less than an eye sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGEST_TILE = 512
"""Pixels of a tile's side. diffusers takes the size a VAE was trained on: Flux's 1024 cut next to nothing."""


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Within the block, `vae.decode` works in tiles where it is `wanted`. Afterwards the VAE is as it was before."""
    if not wanted:
        yield
        return
    names = ("tile_sample_min_size", "tile_latent_min_size", "use_tiling")
    before = {name: getattr(vae, name) for name in names if hasattr(vae, name)}
    vae.enable_tiling()
    if before.get("tile_sample_min_size", 0) > LARGEST_TILE:
        shrink = LARGEST_TILE / vae.tile_sample_min_size
        vae.tile_sample_min_size = LARGEST_TILE
        vae.tile_latent_min_size = int(vae.tile_latent_min_size * shrink)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
