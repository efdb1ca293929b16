"""Decoding in tiles: a fraction of the memory, and pixels that differ along the seams by less than an eye sees."""
# FROM pipelines.compiled: A denoiser's blocks as torch.compile makes them: the same arithmetic, in fewer passes over memory.
# FROM pipelines.prompts: A model's prompts, through its text encoders or from what is kept of them.
# FROM pipelines.steps: How far a run has come, from diffusers' pipelines to whoever wants to know.

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipelines.base import OnStep, Weights
from pipelines.residency.host_cache import Tensors
from pipelines.residency.residency import Residency

BACKEND = "inductor"


@contextmanager
def compiled_blocks(denoiser: torch.nn.Module, wanted: bool) -> Iterator[None]:
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


class PromptEncoder:
    """Texts of at most `max_tokens` tokens. The names are those of components, and of folders of tokenizers."""

    def __init__(
        self,
        weights: Weights,
        residency: Residency,
        encoders: Sequence[str],
        tokenizers: Sequence[str],
        max_tokens: int,
    ) -> None:
        self.max_tokens = max_tokens
        self._residency = residency
        self._encoders = tuple(weights.component(name).key for name in encoders)
        self._tokenizers = tokenizer_key(*(weights.folder / name for name in tokenizers))

    def embeds(self, text: str, encode: Callable[[], Sequence[torch.Tensor | None]]) -> Tensors:
        """What `encode` makes of the text, on the device. Of a text that was encoded before, without any encoder."""
        key = (*self._encoders, self._tokenizers, text, self.max_tokens)
        return self._residency.embeddings.get(key, self._residency.device, encode)


def tokenizer_key(*folders: Path) -> str:
    """The hash of tokenizers' files."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def step_callback(on_step: OnStep) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A `callback_on_step_end`. What `on_step` raises ends the run."""

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step("denoise", step + 1, pipe.num_timesteps)
        return tensors

    return report


LARGEST_TILE = 512
"""Pixels of a tile's side. diffusers takes the size a VAE was trained on: Flux's 1024 cut next to nothing."""


@contextmanager
def tiled_decoding(vae: Any, wanted: bool) -> Iterator[None]:
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
