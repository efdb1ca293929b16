"""Where each of a module's tensors lies in one buffer: what is in no block first, then block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a cache line, and enough for any vector load."""

BLOCK_ALIGNMENT_BYTES = 512
"""Every block does, as all that CUDA's allocator gives: wherever it is its tensors lie alike, and kernels run alike."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the buffer, and as what: a layer may have pointed it at something else meanwhile."""

    tensor: torch.Tensor
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        """Where the next tensor may start."""
        size_bytes = self.shape.numel() * self.dtype.itemsize
        return self.offset + -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def point(self, buffer: torch.Tensor, start: int = 0) -> None:
        """Let the tensor be a view into `buffer`, which holds the bytes from `start` on."""
        at = self.offset - start
        size_bytes = self.shape.numel() * self.dtype.itemsize
        self.tensor.data = buffer[at : at + size_bytes].view(self.dtype).view(self.shape)


Places = list[Place]


@dataclass(frozen=True)
class Block:
    """One layer of several alike, which are run one after the other: the bytes `start` to `end` of the buffer."""

    module: torch.nn.Module
    places: Places
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """What lies outside of blocks comes first, then block by block in the order of their modules."""

    outside: Places
    outside_bytes: int
    blocks: list[Block]
    total_bytes: int

    @property
    def places(self) -> Places:
        return [*self.outside, *(place for block in self.blocks for place in block.places)]


def lay_out(module: torch.nn.Module) -> Layout:
    """Where each parameter and buffer (the non-persistent too) goes. Tensors that several blocks share go outside."""
    modules = dict(block_modules(module))
    homes: dict[tuple[Any, ...], str | None] = {}
    objects: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}
    for name, tensor in tensors_of(module):
        identity = (tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride())
        home = block_of(name)
        home = home if home in modules else None
        homes[identity] = home if homes.get(identity, home) == home else None
        objects.setdefault(id(tensor), (tensor, identity))
    offsets: dict[tuple[Any, ...], int] = {}
    outside = settle(None, objects, homes, offsets, 0)
    outside_bytes = end = end_of(outside, 0)
    blocks = []
    for name, child in modules.items():
        start = -(-end // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES
        if places := settle(name, objects, homes, offsets, start):
            end = end_of(places, start)
            blocks.append(Block(child, places, start, end))
    return Layout(outside, outside_bytes, blocks, end)


def settle(
    home: str | None,
    objects: dict[int, tuple[torch.Tensor, tuple[Any, ...]]],
    homes: dict[tuple[Any, ...], str | None],
    offsets: dict[tuple[Any, ...], int],
    start: int,
) -> Places:
    """The tensors at home in one block (or outside), one behind the other from `start` on; the same memory once."""
    places: Places = []
    for tensor, identity in objects.values():
        if homes[identity] == home:
            if identity not in offsets:
                offsets[identity] = start
            place = Place(tensor, offsets[identity], tensor.dtype, tensor.shape)
            start = max(start, place.end)
            places.append(place)
    return places


def end_of(places: Places, start: int) -> int:
    return max((place.end for place in places), default=start)


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers with every name they have, in the order of the modules: nearly that of execution."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def block_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The members of the outermost lists of modules."""
    for name, child in module.named_modules():
        if name and block_of(name + ".") == name:
            yield name, child


def block_of(name: str) -> str | None:
    """`blocks.3.norm.weight` -> `blocks.3`; None for what is in no list."""
    parts = name.split(".")
    for n, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: n + 1])
    return None


@torch.inference_mode(False)
def point(places: Places, buffer: torch.Tensor, start: int = 0) -> None:
    """Let all of them be views, alike whether within a run or before it: else compiled code takes them for others."""
    for place in places:
        place.point(buffer, start)
