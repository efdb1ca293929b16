"""What is on this worker's device: each component's weights in one buffer, loaded once and shared by its key."""

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipelines.base import Component

ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a cache line, and enough for any vector load."""


class Residency:
    """The components on one device, least recently used first. For one thread: a worker runs one job at a time.

    On a CPU the host is the device, so evicting drops the weights and the next `hold` reads the files again.
    Elsewhere the host keeps a page-locked copy: coming back is one copy, evicting copies nothing. Those host copies
    stay until `clear()`; nothing limits their bytes yet.
    """

    def __init__(self, device: str | torch.device, copies_to_device: bool | None = None) -> None:
        self.device = torch.device(device)
        self._copies_to_device = self.device.type != "cpu" if copies_to_device is None else copies_to_device
        self._resident: dict[str, PackedModule | Opaque] = {}
        self._on_host: dict[str, PackedModule] = {}

    def hold(self, component: Component, load: Callable[[Component], Any]) -> Any:
        """What `load` made of the component, with its weights on the device; `load` runs only if no copy is here.

        `load` returns a module on the host, or any other object (an ONNX session) already on the device.
        Whatever it raises comes out, and so does running out of memory: then the component is not resident.
        """
        resident = self._resident.pop(component.key, None)
        if resident is None:
            # A tensor made in inference mode could never again be pointed elsewhere.
            with torch.inference_mode(False), torch.no_grad():
                resident = self._bring(component, load)
        self._resident[component.key] = resident
        return resident.loaded

    def evict(self, key: str) -> None:
        """Give the component's bytes on the device back; nothing happens where it is not resident."""
        if resident := self._resident.pop(key, None):
            resident.leave_device()

    def resident(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes on the device, least recently used first."""
        return tuple((key, resident.weights_bytes) for key, resident in self._resident.items())

    def clear(self) -> None:
        """Give everything back, the host copies too."""
        for key in tuple(self._resident):
            self.evict(key)
        while self._on_host:
            self._on_host.popitem()[1].leave_host()

    def _bring(self, component: Component, load: Callable[[Component], Any]) -> "PackedModule | Opaque":
        packed = self._on_host.get(component.key)
        if packed is None:
            loaded = load(component)
            if not isinstance(loaded, torch.nn.Module):
                return Opaque(loaded, component.weights_bytes)
            packed = PackedModule(loaded)
            if not self._copies_to_device:
                return packed
            packed.page_lock(self.device)
            self._on_host[component.key] = packed
        packed.enter_device(self.device)
        return packed


class Opaque:
    """An object that keeps its own weights on the device. Dropped when evicted, so let nobody else keep it."""

    def __init__(self, loaded: Any, weights_bytes: int) -> None:
        self.loaded = loaded
        self.weights_bytes = weights_bytes

    def leave_device(self) -> None:
        self.loaded = None


class PackedModule:
    """A module whose parameters and buffers are views into one buffer: the host's, or a copy of it on the device.

    The module object outlives its weights' moves. Tensors that share memory (tied weights) go on sharing it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.loaded = module
        self._places, total_bytes = lay_out(module)
        self._host = host_buffer(total_bytes)
        self._device: torch.Tensor | None = None
        self._page_locked = False
        for tensor, offset in self._places:
            place = view_like(tensor, self._host, offset)
            tensor.data = place.copy_(tensor)

    @property
    def weights_bytes(self) -> int:
        return self._host.nbytes

    def page_lock(self, device: torch.device) -> None:
        """Page-lock the host buffer, so that the device reads it at the link's full rate."""
        if device.type == "cuda":
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), self._host.nbytes, 0))
            self._page_locked = True

    def enter_device(self, device: torch.device) -> None:
        self._device = torch.empty_like(self._host, device=device).copy_(self._host)
        self._point_at(self._device)

    def leave_device(self) -> None:
        """Free the device's copy; without one the host is the device, and the weights are gone."""
        if self._device is None:
            self.leave_host()
            return
        self._point_at(self._host)
        freed, self._device = self._device.device, None
        if freed.type == "cuda":
            torch.cuda.empty_cache()  # else small tensors move into the freed block, and it fits no component again

    def leave_host(self) -> None:
        """Free the host's copy. The module is of no use any more, whoever still has it."""
        for tensor, _ in self._places:
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        if self._page_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr()))
        del self._host

    def _point_at(self, buffer: torch.Tensor) -> None:
        for tensor, offset in self._places:
            tensor.data = view_like(tensor, buffer, offset)


def lay_out(module: torch.nn.Module) -> tuple[list[tuple[torch.Tensor, int]], int]:
    """Each parameter and buffer (the non-persistent too) with its offset in the buffer; and the buffer's bytes."""
    places: list[tuple[torch.Tensor, int]] = []
    offsets: dict[tuple[Any, ...], int] = {}
    total_bytes = 0
    for tensor in tensors_of(module):
        identity = (tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in offsets:
            offsets[identity] = total_bytes
            total_bytes += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        places.append((tensor, offsets[identity]))
    return places, total_bytes


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers in the order of the modules, which is nearly that of execution; each object once."""
    yield from module.parameters()
    yield from module.buffers()


def view_like(tensor: torch.Tensor, buffer: torch.Tensor, offset: int) -> torch.Tensor:
    """The bytes at `offset` seen with the tensor's dtype and shape."""
    return buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def host_buffer(size_bytes: int) -> torch.Tensor:
    """Bytes in pages of their own: they go back to the system when freed, and no two buffers share a locked page."""
    pages = mmap.mmap(-1, max(size_bytes, ALIGNMENT_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)
