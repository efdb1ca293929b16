"""What text encoders made of prompts, kept in host memory: a repeated prompt needs no text encoder."""
# FROM pipelines.hostram: The copies of weights that stay in host memory, page-locked where CUDA is, within a budget of bytes.

from collections.abc import Callable, Collection, Sequence

import torch

from pipelines.residency.packed import PackedModule

GIB = 2**30


class HostMemoryExhausted(MemoryError):
    """Host memory may not hold what a run needs. The message has the numbers."""


class HostCache:
    """By component key, least recently used first. `reserved` are bytes by key of copies that are being made."""

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.copies: dict[str, PackedModule] = {}
        self.reserved: dict[str, int] = {}

    @property
    def total_bytes(self) -> int:
        return sum(copy.weights_bytes for copy in self.copies.values())

    def find(self, key: str) -> PackedModule | None:
        if copy := self.copies.pop(key, None):
            self.copies[key] = copy
        return copy

    def make_room(self, needed_bytes: int, in_use: Collection[str]) -> None:
        """Drop copies that nothing on the device needs, the least recently used first.

        Raises HostRamShort if that is not enough; then nothing is dropped.
        """
        if self.budget_bytes is None:
            return
        free = [key for key in self.copies if key not in in_use]
        reserved_bytes = sum(self.reserved.values())
        used_bytes = self.total_bytes + reserved_bytes - sum(self.copies[key].weights_bytes for key in free)
        if used_bytes + needed_bytes > self.budget_bytes:
            raise HostMemoryExhausted(
                f"A copy of {needed_bytes / GIB:.2f} GiB beside {used_bytes / GIB:.2f} GiB in use is more than the "
                f"{self.budget_bytes / GIB:.2f} GiB of host memory for the copies of weights."
            )
        while self.total_bytes + reserved_bytes + needed_bytes > self.budget_bytes:
            self.drop(free.pop(0))

    def keep(self, key: str, copy: PackedModule) -> None:
        self.copies[key] = copy

    def drop(self, key: str) -> None:
        self.copies.pop(key).free_host()

    def clear(self) -> None:
        while self.copies:
            self.drop(next(iter(self.copies)))


BUDGET_BYTES = 512 * 2**20
"""Flux takes 4 MB a prompt: over a hundred of them."""

Tensors = tuple[torch.Tensor | None, ...]


class EmbeddingCache:
    """By what they were made with and from, least recently used first. Exactly the bits that the encoder gave."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._kept: dict[tuple[object, ...], Tensors] = {}

    @property
    def total_bytes(self) -> int:
        return sum(tensors_bytes(tensors) for tensors in self._kept.values())

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


def tensors_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
