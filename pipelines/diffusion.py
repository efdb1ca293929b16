"""Shared by diffusion families: size checks, cached prompt encoding, step callbacks, torch.compile, VAE tiling."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipelines.base import InvalidInput, OnStep, Weights
from pipelines.residency.host_cache import Tensors
from pipelines.residency.residency import Residency

COMPILE_BACKEND = "inductor"
MAX_TILE = 512
"""Pixels of a tile's side. diffusers takes the size that a VAE was trained on; Flux's 1024 saves next to no memory."""


def check_size(width: int, height: int, multiple: int) -> None:
    """Raises `InvalidInput` unless both sides are multiples of `multiple` pixels."""
    if width % multiple or height % multiple:
        raise InvalidInput(f"{width} x {height}: width and height must be multiples of {multiple}.")


def check_frame_count(count: int, frames_per_latent: int, appended: bool) -> None:
    """Raises `InvalidInput` unless a video VAE can make `count` frames: the first has a latent of its own.

    `appended` frames follow others, so that they have no first one.
    """
    if (count - (0 if appended else 1)) % frames_per_latent:
        rule = f"a multiple of {frames_per_latent}"
        raise InvalidInput(
            f"{count} frames: " + (f"added frames must be {rule}." if appended else f"must be {rule}, plus one.")
        )


class PromptEncoder:
    """Encodes prompts of at most `max_tokens` tokens, and caches their embeddings.

    `encoders` are names of components, `tokenizers` of folders beside them.
    """

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
        """What `encode` makes of the text, on the device. A cached text needs no text encoder."""
        key = (*self._encoders, self._tokenizers, text, self.max_tokens)
        return self._residency.embeddings.get(key, self._residency.device, encode)


def tokenizer_key(*folders: Path) -> str:
    """The SHA-256 of all files of the tokenizers."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def step_callback(on_step: OnStep) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A `callback_on_step_end` for diffusers' pipelines. What `on_step` raises ends the run."""

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step("denoise", step + 1, pipe.num_timesteps)
        return tensors

    return report


@contextmanager
def compiled_blocks(denoiser: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Within the block, if `wanted`, the denoiser's repeated blocks run through torch.compile.

    One block of each kind is compiled, for all of its kind. Only the computation is compiled: the hooks that load a
    block's weights stay outside, and weights are inputs, so it works in every tier and after any move; and for any
    size of picture. torch keeps compiled code as long as the process runs. It needs a C compiler, on a CPU and on CUDA.
    """
    blocks = repeated_blocks(denoiser) if wanted else []
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=COMPILE_BACKEND)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def repeated_blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that diffusers' `compile_repeated_blocks` compiles."""
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    return [module for module in denoiser.modules() if type(module).__name__ in names]


@contextmanager
def tiled_decoding(vae: Any, wanted: bool) -> Iterator[None]:
    """Within the block, if `wanted`, `vae.decode` works in tiles. Afterwards the VAE's settings are restored.

    This takes a fraction of the memory; pixels along the seams differ by less than the eye can see.
    """
    if not wanted:
        yield
        return
    names = ("tile_sample_min_size", "tile_latent_min_size", "use_tiling")
    before = {name: getattr(vae, name) for name in names if hasattr(vae, name)}
    vae.enable_tiling()
    if before.get("tile_sample_min_size", 0) > MAX_TILE:
        shrink = MAX_TILE / vae.tile_sample_min_size
        vae.tile_sample_min_size = MAX_TILE
        vae.tile_latent_min_size = int(vae.tile_latent_min_size * shrink)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
