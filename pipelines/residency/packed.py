"""Packs a module's parameters and buffers into one buffer in host memory, and copies it to the device in one piece."""

import logging
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipelines.residency.transfer import DeviceTransfer

log = logging.getLogger("plantain.packing")

ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a cache line, which suffices for any vector load."""

BLOCK_ALIGNMENT_BYTES = 512
"""Every block starts at a multiple of this, as does all that CUDA's allocator returns: in any buffer its tensors have
the same alignment, so that the same kernels run."""


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's offset, dtype and shape in the buffer. The tensor may point elsewhere for a while (fp8 upcasting)."""

    tensor: torch.Tensor
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        """The offset at which the next tensor may start."""
        size_bytes = self.shape.numel() * self.dtype.itemsize
        return self.offset + -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def point(self, buffer: torch.Tensor, start: int = 0) -> None:
        """Makes the tensor a view into `buffer`, which has the packed bytes from offset `start` on."""
        at = self.offset - start
        size_bytes = self.shape.numel() * self.dtype.itemsize
        self.tensor.data = buffer[at : at + size_bytes].view(self.dtype).view(self.shape)


TensorSlots = list[TensorSlot]


@dataclass(frozen=True)
class Block:
    """One of several successive layers of the same kind: the bytes `start` to `end` of the buffer."""

    module: torch.nn.Module
    slots: TensorSlots
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a module is in the buffer: first those outside of blocks, then block by block, in order."""

    unblocked: TensorSlots
    unblocked_bytes: int
    blocks: list[Block]
    total_bytes: int

    @property
    def slots(self) -> TensorSlots:
        return [*self.unblocked, *(slot for block in self.blocks for slot in block.slots)]


def lay_out(module: torch.nn.Module) -> Layout:
    """Lays out all parameters and buffers, persistent or not. Tensors that blocks share go outside of blocks."""
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
    """Slots of the tensors of one block (None: outside of blocks), from `start` on. Shared memory gets one offset."""
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
    """Parameters and buffers under each of their names, in the order of the modules: nearly that of execution."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def block_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The members of the outermost module lists, with their names."""
    for name, child in module.named_modules():
        if name and block_of(name + ".") == name:
            yield name, child


def block_of(name: str) -> str | None:
    """`blocks.3.norm.weight` -> `blocks.3`; None if the name is not in a list."""
    parts = name.split(".")
    for n, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: n + 1])
    return None


@torch.inference_mode(False)
def point(slots: TensorSlots, buffer: torch.Tensor, start: int = 0) -> None:
    """Makes all of them views into `buffer`. Not as inference tensors, for which torch.compile would compile again."""
    for slot in slots:
        slot.point(buffer, start)


class DeviceCopy(Protocol):
    """A module's weights on the device, in whole (`ResidentCopy`) or in part (`StreamedCopy`)."""

    @property
    def size_bytes(self) -> int: ...

    def release(self) -> None: ...


class PackedModule:
    """A module whose parameters and buffers are views into one buffer in host memory, or into a copy on the device.

    The module object stays the same while its weights move. Tensors that share memory (tied weights) keep sharing it.
    """

    def __init__(self, loaded: torch.nn.Module, layout: Layout, host: torch.Tensor) -> None:
        """For a module that is packed already: its tensors point into `host`, as in `layout`."""
        self.loaded, self.layout, self.host = loaded, layout, host
        self.page_locked = False
        self.kept_bytes: int | None = None
        self._device_copy: DeviceCopy | None = None

    @classmethod
    def of(cls, module: torch.nn.Module, buffer: Callable[[int], torch.Tensor] | None = None) -> "PackedModule":
        """Copies the module's tensors into one new buffer, allocated by `buffer(size_bytes)`."""
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
        """Its bytes on the device now; on a CPU, the host buffer's."""
        return self._device_copy.size_bytes if self._device_copy else self.host.nbytes

    def fault_in_pages(self) -> None:
        """Maps every page of the host buffer into this process, if another process has filled it."""
        self.host[:: mmap.PAGESIZE].sum()

    def page_lock(self, device: torch.device) -> None:
        """Page-locks the host buffer, so that the device reads it at the full rate. If that fails, logs a warning."""
        if device.type != "cuda":
            return
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), self.host.nbytes, 0))
            self.page_locked = True
        except RuntimeError as error:
            log.warning("%s of host memory could not be page-locked: %s", self.host.nbytes, error)

    def attach(self, device_copy: "DeviceCopy", kept_bytes: int | None = None) -> None:
        """Sets the copy on the device; for a streamed one, with the bytes of blocks that may stay there."""
        self._device_copy, self.kept_bytes = device_copy, kept_bytes

    def free_device(self) -> None:
        """Frees the copy on the device. Without one the host is the device, and the weights are freed."""
        if self._device_copy is None:
            self.free_host()
            return
        device_copy, self._device_copy, self.kept_bytes = self._device_copy, None, None
        device_copy.release()
        point(self.layout.slots, self.host)
        del device_copy
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # else small tensors are placed in the freed block, which then fits no component

    def free_host(self) -> None:
        """Frees the host buffer. The module is unusable afterwards."""
        for slot in self.layout.slots:
            slot.tensor.data = torch.empty(0, dtype=slot.dtype)
        if self.page_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr()))
        del self.host


class ResidentCopy:
    """A module's whole copy on the device. Hooks make each block wait for its own copy only, in order of execution."""

    def __init__(self, packed: PackedModule, transfer: DeviceTransfer, buffer: torch.Tensor | None = None) -> None:
        """`buffer` is on the device, as large as the host's; allocated here by default."""
        layout, host, self._transfer = packed.layout, packed.host, transfer
        self._buffer = torch.empty_like(host, device=transfer.device) if buffer is None else buffer
        transfer.wait_for_compute()
        transfer.wait(transfer.copy(self._buffer[: layout.unblocked_bytes], host[: layout.unblocked_bytes]))
        self._hooks = []
        for block in layout.blocks:
            arrived = transfer.copy(self._buffer[block.start : block.end], host[block.start : block.end])
            if arrived is not None:
                self._hooks.append(block.module.register_forward_pre_hook(self._wait_for(arrived), prepend=True))
        point(layout.slots, self._buffer)

    @property
    def size_bytes(self) -> int:
        return self._buffer.nbytes

    def release(self) -> None:
        """Removes the hooks, so that the buffer can be freed once all copies have ended."""
        self._transfer.synchronize()
        for hook in self._hooks:
            hook.remove()

    def _wait_for(self, arrived: Any) -> Any:
        return lambda module, inputs: self._transfer.wait(arrived)


def host_buffer(size_bytes: int) -> torch.Tensor:
    """A buffer in pages of its own: they return to the system when freed, and no two buffers share a locked page."""
    pages = mmap.mmap(-1, max(size_bytes, ALIGNMENT_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)
