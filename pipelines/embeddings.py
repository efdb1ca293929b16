"""What text encoders made of prompts, kept in host memory: a repeated prompt needs no text encoder."""

from collections.abc import Callable, Sequence

import torch

BUDGET_BYTES = 512 * 2**20
"""Flux takes 4 MB a prompt: over a hundred of them."""

Tensors = tuple[torch.Tensor | None, ...]


class Embeddings:
    """By what they were made with and from, least recently used first. Exactly the bits that the encoder gave."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._kept: dict[tuple[object, ...], Tensors] = {}

    @property
    def total_bytes(self) -> int:
        return sum(size_of(tensors) for tensors in self._kept.values())

    def get(
        self, key: tuple[object, ...], device: torch.device, make: Callable[[], Sequence[torch.Tensor | None]]
    ) -> Tensors:
        """The tensors of `key` on the device; `make` runs if they are not kept. What it raises comes out.

        The key names encoder keys, tokenizers, the text and its greatest length, and whatever else changes the result.
        """
        kept = self._kept.pop(key, None)
        if kept is None:
            made = tuple(make())
            kept = tuple(None if tensor is None else tensor.detach().to("cpu", copy=True) for tensor in made)
        self._kept[key] = kept
        while self._kept and self.total_bytes > self.budget_bytes:
            del self._kept[next(iter(self._kept))]
        return tuple(None if tensor is None else tensor.to(device) for tensor in kept)


def size_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
