"""A module's parameters and buffers in one buffer: the host's, and on the device a copy of it, whole or in part."""
# FROM pipelines.layout: Where each of a module's tensors lies in one buffer: what is in no block first, then block by block.

import logging
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.residency.transfer import DeviceTransfer

log = logging.getLogger("plantain.packing")

ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a cache line, and enough for any vector load."""

BLOCK_ALIGNMENT_BYTES = 512
"""Every block does, as all that CUDA's allocator gives: wherever it is its tensors lie alike, and kernels run alike."""


@dataclass(frozen=True)
class TensorSlot:
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


TensorSlots = list[TensorSlot]


@dataclass(frozen=True)
class Block:
    """One layer of several alike, which are run one after the other: the bytes `start` to `end` of the buffer."""

    module: torch.nn.Module
    slots: TensorSlots
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """What lies outside of blocks comes first, then block by block in the order of their modules."""

    unblocked: TensorSlots
    unblocked_bytes: int
    blocks: list[Block]
    total_bytes: int

    @property
    def slots(self) -> TensorSlots:
        return [*self.unblocked, *(slot for block in self.blocks for slot in block.slots)]


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
    unblocked = _place_tensors(None, objects, homes, offsets, 0)
    unblocked_bytes = end = end_of(unblocked, 0)
    blocks = []
    for name, child in modules.items():
        start = -(-end // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES
        if slots := _place_tensors(name, objects, homes, offsets, start):
            end = end_of(slots, start)
            blocks.append(Block(child, slots, start, end))
    return Layout(unblocked, unblocked_bytes, blocks, end)


def _place_tensors(
    home: str | None,
    objects: dict[int, tuple[torch.Tensor, tuple[Any, ...]]],
    homes: dict[tuple[Any, ...], str | None],
    offsets: dict[tuple[Any, ...], int],
    start: int,
) -> TensorSlots:
    """The tensors at home in one block (or outside), one behind the other from `start` on; the same memory once."""
    slots: TensorSlots = []
    for tensor, identity in objects.values():
        if homes[identity] == home:
            if identity not in offsets:
                offsets[identity] = start
            slot = TensorSlot(tensor, offsets[identity], tensor.dtype, tensor.shape)
            start = max(start, slot.end)
            slots.append(slot)
    return slots


def end_of(slots: TensorSlots, start: int) -> int:
    return max((slot.end for slot in slots), default=start)


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
def point(slots: TensorSlots, buffer: torch.Tensor, start: int = 0) -> None:
    """Let all of them be views, alike whether within a run or before it: else compiled code takes them for others."""
    for slot in slots:
        slot.point(buffer, start)


class PackedModule:
    """A module whose parameters and buffers are views into one buffer: the host's, or a copy of it on the device.

    The module object outlives its weights' moves. Tensors that share memory (tied weights) go on sharing it.
    """

    def __init__(self, loaded: torch.nn.Module, layout: Layout, host: torch.Tensor) -> None:
        """Of a module that is packed already: its tensors point into `host`, as `layout` says."""
        self.loaded, self.layout, self.host = loaded, layout, host
        self.page_locked = False
        self.kept_bytes: int | None = None
        self._device_copy: Any = None

    @classmethod
    def of(cls, module: torch.nn.Module, buffer: Callable[[int], torch.Tensor] | None = None) -> "PackedModule":
        """Copy the module's tensors into one new buffer, made by `buffer` of so many bytes."""
        layout = lay_out(module)
        host = (buffer or host_buffer)(layout.total_bytes)
        for slot in layout.slots:
            loaded = slot.tensor.data
            slot.point(host)
            slot.tensor.data.copy_(loaded)
        return cls(module, layout, host)

    @property
    def weights_bytes(self) -> int:
        return self.host.nbytes

    @property
    def device_bytes(self) -> int:
        """What it takes on the device now; where the host is the device, the host's copy."""
        return self._device_copy.size_bytes if self._device_copy else self.host.nbytes

    def fault_in_pages(self) -> None:
        """Have every page of the host's buffer in this process's resident set, where another one has filled it."""
        self.host[:: mmap.PAGESIZE].sum()

    def page_lock(self, device: torch.device) -> None:
        """Page-lock the host buffer, so that the device reads it at the link's full rate; slower where that fails."""
        if device.type != "cuda":
            return
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), self.host.nbytes, 0))
            self.page_locked = True
        except RuntimeError as error:
            log.warning("%s of host memory could not be page-locked: %s", self.host.nbytes, error)

    def attach(self, device_copy: "ResidentCopy | Any", kept_bytes: int | None = None) -> None:
        """It is on the device now, whole, or streamed with so many bytes of blocks that stay."""
        self._device_copy, self.kept_bytes = device_copy, kept_bytes

    def free_device(self) -> None:
        """Free the device's copy; without one the host is the device, and the weights are gone."""
        if self._device_copy is None:
            self.free_host()
            return
        device_copy, self._device_copy, self.kept_bytes = self._device_copy, None, None
        device_copy.leave()
        point(self.layout.slots, self.host)
        del device_copy
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # else small tensors move into the freed block, and it fits no component again

    def free_host(self) -> None:
        """Free the host's copy. The module is of no use any more, whoever still has it."""
        for slot in self.layout.slots:
            slot.tensor.data = torch.empty(0, dtype=slot.dtype)
        if self.page_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr()))
        del self.host


class ResidentCopy:
    """All of a module on the device. Blocks arrive in the order of their runs: the first need not wait for the last."""

    def __init__(self, packed: PackedModule, link: DeviceTransfer, buffer: torch.Tensor | None = None) -> None:
        """`buffer` is on the device, as large as the host's."""
        layout, host, self._link = packed.layout, packed.host, link
        self._buffer = torch.empty_like(host, device=link.device) if buffer is None else buffer
        link.wait_for_compute()
        link.wait(link.copy(self._buffer[: layout.unblocked_bytes], host[: layout.unblocked_bytes]))
        self._hooks = []
        for block in layout.blocks:
            arrived = link.copy(self._buffer[block.start : block.end], host[block.start : block.end])
            if arrived is not None:
                self._hooks.append(block.module.register_forward_pre_hook(self._wait_for(arrived), prepend=True))
        point(layout.slots, self._buffer)

    @property
    def size_bytes(self) -> int:
        return self._buffer.nbytes

    def leave(self) -> None:
        self._link.synchronize()
        for hook in self._hooks:
            hook.remove()

    def _wait_for(self, arrived: Any) -> Any:
        return lambda module, inputs: self._link.wait(arrived)


def host_buffer(size_bytes: int) -> torch.Tensor:
    """Bytes in pages of their own: they go back to the system when freed, and no two buffers share a locked page."""
    pages = mmap.mmap(-1, max(size_bytes, ALIGNMENT_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)
