"""LRU caches in host memory: copies of weights, page-locked where CUDA is used, and the embeddings of prompts."""

from collections.abc import Callable, Collection, Sequence

import torch

from pipelines.residency.packed import PackedModule

GIB = 2**30
EMBEDDINGS_BUDGET_BYTES = 512 * 2**20
"""A prompt's embeddings take 4 MB with Flux, so this is more than a hundred of them."""

Tensors = tuple[torch.Tensor | None, ...]


class HostMemoryExhausted(MemoryError):
    """The budget of host memory does not suffice for what a run needs. The message has the numbers."""


class HostCache:
    """Copies of weights by component key, least recently used first.

    `budget_bytes` limits their sum with `reserved`, the bytes by key of copies that are being made.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.copies: dict[str, PackedModule] = {}
        self.reserved: dict[str, int] = {}

    @property
    def total_bytes(self) -> int:
        return sum(copy.weights_bytes for copy in self.copies.values())

    def find(self, key: str) -> PackedModule | None:
        """The copy, which becomes the most recently used; None if there is none."""
        if copy := self.copies.pop(key, None):
            self.copies[key] = copy
        return copy

    def make_room(self, needed_bytes: int, in_use: Collection[str]) -> None:
        """Drops copies, the least recently used first, but none whose key is `in_use`.

        Raises HostMemoryExhausted if that does not suffice; then nothing is dropped.
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

    def reserve(self, key: str, needed_bytes: int, in_use: Collection[str]) -> None:
        """Makes room for a copy that is about to be made, and counts it as used. Raises HostMemoryExhausted."""
        self.make_room(needed_bytes, in_use)
        self.reserved[key] = needed_bytes

    def release(self, key: str) -> None:
        """Ends a reservation, if there is one."""
        self.reserved.pop(key, None)

    def keep(self, key: str, copy: PackedModule) -> None:
        """Adds a copy, which takes the place of its reservation."""
        self.release(key)
        self.copies[key] = copy

    def drop(self, key: str) -> None:
        self.copies.pop(key).free_host()

    def clear(self) -> None:
        while self.copies:
            self.drop(next(iter(self.copies)))


class EmbeddingCache:
    """Embeddings of prompts, least recently used first, bit for bit: a repeated prompt needs no text encoder."""

    def __init__(self, budget_bytes: int = EMBEDDINGS_BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._kept: dict[tuple[object, ...], Tensors] = {}

    @property
    def total_bytes(self) -> int:
        return sum(tensors_bytes(tensors) for tensors in self._kept.values())

    def get(
        self, key: tuple[object, ...], device: torch.device, make: Callable[[], Sequence[torch.Tensor | None]]
    ) -> Tensors:
        """The tensors of `key`, on the device. Calls `make` on a cache miss, and raises what it raises.

        The key must contain everything that changes the result: encoders, tokenizers, the text and its maximum length.
        """
        kept = self._kept.pop(key, None)
        if kept is None:
            made = tuple(make())
            kept = tuple(None if tensor is None else tensor.detach().to("cpu", copy=True) for tensor in made)
        self._kept[key] = kept
        while self._kept and self.total_bytes > self.budget_bytes:
            del self._kept[next(iter(self._kept))]
        return tuple(None if tensor is None else tensor.to(device) for tensor in kept)

    def clear(self) -> None:
        self._kept.clear()


def tensors_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
