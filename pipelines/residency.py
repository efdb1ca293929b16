"""What is on this worker's device: each component's weights in one buffer, loaded once and shared by its key."""

import time
from collections.abc import Callable
from typing import Any

import torch

from pipelines.base import Component, Held, Way
from pipelines.embeddings import Embeddings
from pipelines.hostram import HostCopies
from pipelines.link import Link
from pipelines.meter import Meter, gauge_for
from pipelines.packing import ALIGNMENT_BYTES, PackedModule, Whole
from pipelines.streaming import Streamed

__all__ = ["ALIGNMENT_BYTES", "Opaque", "Residency"]


class Residency:
    """The components on one device, least recently used first. For one thread: a worker runs one job at a time.

    On a CPU the host is the device, so evicting drops the weights and the next `hold` reads the files again.
    Elsewhere the host keeps a page-locked copy: coming back is one copy, evicting copies nothing. Those copies stay
    within `host_budget_bytes`, where it is given: the least recently used go first.

    A run follows the `Way` of `begin()`. In the tiers `staged` and `streamed` a phase drops what it does not need of
    the components of the run; others' stay, since what was evicted for the run is gone already.
    """

    def __init__(
        self,
        device: str | torch.device,
        copies_to_device: bool | None = None,
        host_budget_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.device = torch.device(device)
        self.way = Way()
        self.phase: str | None = None
        self.embeddings = Embeddings()
        self.meter = Meter(gauge_for(self.device), lambda: self.weights_bytes)
        self._copies_to_device = self.device.type != "cpu" if copies_to_device is None else copies_to_device
        self._link = Link(self.device)
        self._resident: dict[str, PackedModule | Opaque] = {}
        self._host = HostCopies(host_budget_bytes)
        self._clock = clock
        self._names: dict[str, str] = {}
        self._since: dict[str, float] = {}

    # One run

    def begin(self, way: Way) -> None:
        """A run starts, in this way."""
        self.way, self.phase = way, None
        self.meter.begin()

    def enter(self, phase: str) -> None:
        """The run goes into a phase. Components of the run that the phase does not need go, but in tier `resident`."""
        if phase == self.phase:
            return
        self.phase = phase
        self.meter.enter(phase)
        phases = dict(self.way.phases)
        if self.way.tier != "resident" and phase in phases:
            for key in {key for keys in phases.values() for key in keys} - set(phases[phase]):
                self.evict(key)
        self.meter.restart()

    def hold(self, component: Component, load: Callable[[Component], Any]) -> Any:
        """What `load` made of the component, with its weights on the device; `load` runs only if no copy is here.

        `load` returns a module on the host, or any other object (an ONNX session) already on the device.
        Whatever it raises comes out, and so does running out of memory: then the component is not resident.
        """
        self._meet(component.key)
        self.meter.lap()  # before any weights move: they are not counted, and the peak is that of before
        kept_bytes = dict(self.way.kept).get(component.key) if self._copies_to_device else None
        resident = self._resident.pop(component.key, None)
        if isinstance(resident, PackedModule) and resident.kept_bytes != kept_bytes:
            resident.leave_device()
            resident = None
        if resident is None:
            self._since[component.key], self._names[component.key] = self._clock(), component.name
            # A tensor made in inference mode could never again be pointed elsewhere.
            with torch.inference_mode(False), torch.no_grad():
                resident = self._bring(component, load, kept_bytes)
        self._resident[component.key] = resident
        self.meter.restart()
        return resident.loaded

    def rest(self) -> None:
        """The run is over: what the allocator keeps for the next one goes back, so that the driver tells of others."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # What is there

    def evict(self, key: str) -> None:
        """Give the component's bytes on the device back; nothing happens where it is not resident."""
        if resident := self._resident.pop(key, None):
            resident.leave_device()

    def resident(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes on the device, least recently used first."""
        return tuple((key, resident.device_bytes) for key, resident in self._resident.items())

    @property
    def weights_bytes(self) -> int:
        """What weights take of the memory that is measured: the device's; of a CPU, the host's copies too."""
        device_bytes = sum(bytes_ for _, bytes_ in self.resident())
        return device_bytes + (self._host.total_bytes if self.device.type == "cpu" else 0)

    def held(self) -> tuple[Held, ...]:
        """All that is on the device or has a copy in host memory."""
        sizes = dict(self.resident())
        copies = self._host.copies
        return tuple(
            Held(
                key=key,
                name=self._names[key],
                device_bytes=sizes.get(key, 0),
                host_bytes=copies[key].weights_bytes if key in copies else 0,
                page_locked=key in copies and copies[key].page_locked,
                streamed=key in copies and copies[key].kept_bytes is not None,
                since_at=self._since[key],
            )
            for key in {**sizes, **copies}
        )

    def evict_all(self) -> None:
        for key in tuple(self._resident):
            self.evict(key)

    def clear(self) -> None:
        """Give everything back, the host copies too."""
        self.evict_all()
        self._host.clear()

    def _meet(self, key: str) -> None:
        """A component of a later phase is wanted: that phase begins."""
        if self.phase is not None and key in dict(self.way.phases).get(self.phase, (key,)):
            return
        names = [name for name, _ in self.way.phases]
        later = self.way.phases[names.index(self.phase) + 1 if self.phase in names else 0 :]
        if following := next((name for name, keys in later if key in keys), None):
            self.enter(following)

    def _bring(
        self, component: Component, load: Callable[[Component], Any], kept_bytes: int | None
    ) -> "PackedModule | Opaque":
        packed = self._host.find(component.key)
        if packed is None:
            if self._copies_to_device:
                self._host.make_room(component.weights_bytes, self._resident.keys())
            loaded = load(component)
            if not isinstance(loaded, torch.nn.Module):
                return Opaque(loaded, component.weights_bytes)
            packed = PackedModule(loaded)
            if not self._copies_to_device:
                return packed
            packed.page_lock(self.device)
            self._host.keep(component.key, packed)
        lodging = Whole(packed, self._link) if kept_bytes is None else Streamed(packed, self._link, kept_bytes)
        packed.lodge(lodging, kept_bytes)
        return packed


class Opaque:
    """An object that keeps its own weights on the device. Dropped when evicted, so let nobody else keep it."""

    def __init__(self, loaded: Any, weights_bytes: int) -> None:
        self.loaded = loaded
        self.device_bytes = weights_bytes

    def leave_device(self) -> None:
        self.loaded = None
