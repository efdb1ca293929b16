"""What a run does with this worker's device: each component's weights come there once, and are shared by their key."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pipelines.base import Component, Peak, Way
from pipelines.books import Books, Opaque
from pipelines.embeddings import Embeddings
from pipelines.hostram import HostRamShort
from pipelines.link import Link
from pipelines.packing import PackedModule, Whole
from pipelines.streaming import Streamed


class Residency(Books):
    """The components on one device, as runs need them. A worker runs one job at a time, on one thread.

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
        device = torch.device(device)
        copies_to_device = device.type != "cpu" if copies_to_device is None else copies_to_device
        super().__init__(device, copies_to_device, host_budget_bytes, clock)
        self.way = Way()
        self.phase: str | None = None
        self.embeddings = Embeddings()
        self._link = Link(self.device)

    def begin(self, way: Way, keys: Iterable[str] = ()) -> None:
        """A run starts, in this way; it may hold components with these keys."""
        with self.lock:
            self.way, self.phase, self.run_keys = way, None, frozenset(keys)
            self.meter.begin()

    def enter(self, phase: str) -> None:
        """The run goes into a phase. Components of the run that the phase does not need go, but in tier `resident`."""
        if phase == self.phase:
            return
        with self.lock:
            self.phase = phase
            self.meter.enter(phase)
            phases = dict(self.way.phases)
            if self.way.tier != "resident" and phase in phases:
                for key in {key for keys in phases.values() for key in keys} - set(phases[phase]):
                    self.evict(key)
            self.meter.restart()

    def end(self) -> tuple[Peak, ...]:
        """The run has ended: its peaks."""
        with self.lock:
            return self.meter.end()

    def rest(self) -> None:
        """The run is over: what the allocator keeps for the next one goes back, so that the driver tells of others."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def hold(self, component: Component, load: Callable[[Component], Any]) -> Any:
        """What `load` made of the component, with its weights on the device; `load` runs only if no copy is here.

        `load` returns a module on the host, or any other object (an ONNX session) already on the device.
        Whatever it raises comes out, and so does running out of memory: then the component is not resident.
        """
        with self.lock:
            self._meet(component.key)
            self.lock.wait_for(lambda: component.key not in self.coming)
            self.meter.lap()  # before any weights move: they are not counted, and the peak is that of before
            kept_bytes = dict(self.way.kept).get(component.key) if self.copies_to_device else None
            resident = self.on_device.pop(component.key, None)
            if isinstance(resident, PackedModule) and resident.kept_bytes != kept_bytes:
                resident.leave_device()
                resident = None
            if resident is None:
                self.note(component)
                # A tensor made in inference mode could never again be pointed elsewhere.
                with torch.inference_mode(False), torch.no_grad():
                    resident = self._bring(component, load, kept_bytes)
            self.on_device[component.key] = resident
            self.meter.restart()
            return resident.loaded

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
    ) -> PackedModule | Opaque:
        packed = self.host.find(component.key)
        if packed is None:
            if self.copies_to_device:
                self._make_room(component.weights_bytes)
            with self.loading:
                loaded = load(component)
            if not isinstance(loaded, torch.nn.Module):
                return Opaque(loaded, component.weights_bytes)
            packed = PackedModule.of(loaded)
            if not self.copies_to_device:
                return packed
            packed.page_lock(self.device)
            self.host.keep(component.key, packed)
        lodging = Whole(packed, self._link) if kept_bytes is None else Streamed(packed, self._link, kept_bytes)
        packed.lodge(lodging, kept_bytes)
        return packed

    def _make_room(self, needed_bytes: int) -> None:
        """In the host's memory, for a run: what is brought for a later one gives way."""
        try:
            self.host.make_room(needed_bytes, {*self.on_device, *self.coming})
        except HostRamShort:
            if not self.coming:
                raise
            for key in tuple(self.coming):
                self.evict(key)
            self.host.make_room(needed_bytes, self.on_device.keys())
