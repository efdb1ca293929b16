"""A module's parameters and buffers in one buffer: the host's, and on the device a copy of it, whole or in part."""

import logging
import mmap
from collections.abc import Callable
from typing import Any

import torch

from pipelines.layout import ALIGNMENT_BYTES, Layout, lay_out, point
from pipelines.link import Link

log = logging.getLogger("plantain.packing")


class PackedModule:
    """A module whose parameters and buffers are views into one buffer: the host's, or a copy of it on the device.

    The module object outlives its weights' moves. Tensors that share memory (tied weights) go on sharing it.
    """

    def __init__(self, loaded: torch.nn.Module, layout: Layout, host: torch.Tensor) -> None:
        """Of a module that is packed already: its tensors point into `host`, as `layout` says."""
        self.loaded, self.layout, self.host = loaded, layout, host
        self.page_locked = False
        self.kept_bytes: int | None = None
        self._lodging: Any = None

    @classmethod
    def of(cls, module: torch.nn.Module, buffer: Callable[[int], torch.Tensor] | None = None) -> "PackedModule":
        """Copy the module's tensors into one new buffer, made by `buffer` of so many bytes."""
        layout = lay_out(module)
        host = (buffer or host_buffer)(layout.total_bytes)
        for place in layout.places:
            loaded = place.tensor.data
            place.point(host)
            place.tensor.data.copy_(loaded)
        return cls(module, layout, host)

    @property
    def weights_bytes(self) -> int:
        return self.host.nbytes

    @property
    def device_bytes(self) -> int:
        """What it takes on the device now; where the host is the device, the host's copy."""
        return self._lodging.size_bytes if self._lodging else self.host.nbytes

    def touch(self) -> None:
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

    def lodge(self, lodging: "Whole | Any", kept_bytes: int | None = None) -> None:
        """It is on the device now, whole, or streamed with so many bytes of blocks that stay."""
        self._lodging, self.kept_bytes = lodging, kept_bytes

    def leave_device(self) -> None:
        """Free the device's copy; without one the host is the device, and the weights are gone."""
        if self._lodging is None:
            self.leave_host()
            return
        lodging, self._lodging, self.kept_bytes = self._lodging, None, None
        lodging.leave()
        point(self.layout.places, self.host)
        del lodging
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # else small tensors move into the freed block, and it fits no component again

    def leave_host(self) -> None:
        """Free the host's copy. The module is of no use any more, whoever still has it."""
        for place in self.layout.places:
            place.tensor.data = torch.empty(0, dtype=place.dtype)
        if self.page_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr()))
        del self.host


class Whole:
    """All of a module on the device. Blocks arrive in the order of their runs: the first need not wait for the last."""

    def __init__(self, packed: PackedModule, link: Link, buffer: torch.Tensor | None = None) -> None:
        """`buffer` is on the device, as large as the host's."""
        layout, host, self._link = packed.layout, packed.host, link
        self._buffer = torch.empty_like(host, device=link.device) if buffer is None else buffer
        link.after_work()
        link.wait(link.copy(self._buffer[: layout.outside_bytes], host[: layout.outside_bytes]))
        self._hooks = []
        for block in layout.blocks:
            arrived = link.copy(self._buffer[block.start : block.end], host[block.start : block.end])
            if arrived is not None:
                self._hooks.append(block.module.register_forward_pre_hook(self._wait_for(arrived), prepend=True))
        point(layout.places, self._buffer)

    @property
    def size_bytes(self) -> int:
        return self._buffer.nbytes

    def leave(self) -> None:
        self._link.settle()
        for hook in self._hooks:
            hook.remove()

    def _wait_for(self, arrived: Any) -> Any:
        return lambda module, inputs: self._link.wait(arrived)


def host_buffer(size_bytes: int) -> torch.Tensor:
    """Bytes in pages of their own: they go back to the system when freed, and no two buffers share a locked page."""
    pages = mmap.mmap(-1, max(size_bytes, ALIGNMENT_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)
