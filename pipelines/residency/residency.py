"""What a run does with this worker's device: each component's weights come there once, and are shared by their key."""
# FROM pipelines.coming: A component on its way to where a later run will need it, while no run asks for it yet.
# FROM pipelines.books: What of which component is where: on the device, in the host's memory, or on its way there.

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pipelines.base import Component, ComponentStatus, ExecutionMode, Peak
from pipelines.residency.host_cache import EmbeddingCache, HostCache, HostMemoryExhausted
from pipelines.residency.packed import PackedModule, ResidentCopy
from pipelines.residency.peak_memory import PeakMeter, gauge_for
from pipelines.residency.streaming import StreamedCopy
from pipelines.residency.transfer import DeviceTransfer


class PrefetchCancelled(Exception):
    """It is not wanted any more."""


class PendingComponent:
    """`loads`: its files are being read, which `stop` ends at once, where that can be. `off`: it was called off.

    `device_bytes` are those that it has taken on the device so far, while it is not resident.
    """

    def __init__(self, weights_bytes: int, to_device: bool, stop: Callable[[], None] = lambda: None) -> None:
        self.weights_bytes, self.to_device = weights_bytes, to_device
        self.device_bytes = 0
        self.loading = self.cancelled = False
        self._stop = stop

    def cancel(self) -> None:
        self.cancelled = True
        if self.loading:
            self._stop()

    def reserve(self, device_bytes: int) -> None:
        self.device_bytes = device_bytes


class DeviceObject:
    """An object that keeps its own weights on the device. Dropped when evicted, so let nobody else keep it."""

    def __init__(self, loaded: Any, weights_bytes: int) -> None:
        self.loaded = loaded
        self.device_bytes = weights_bytes

    def free_device(self) -> None:
        self.loaded = None


class Books:
    """The components on one device and the host's copies, least recently used first.

    Two threads write them: that of the run (`residency`), and one that brings what a later run needs (`fetching`).
    `lock` guards what is where. The run has it for as long as it moves weights; the other thread for moments, never
    while it reads files or copies: the run goes first. What that thread brings is in `coming`: whoever wants to hold
    it waits for it, whoever evicts it calls it off. Whoever loads in this process has `loading` meanwhile.
    """

    def __init__(
        self, device: torch.device, copies_to_device: bool, host_budget_bytes: int | None, clock: Callable[[], float]
    ) -> None:
        self.device, self.copies_to_device = device, copies_to_device
        self.meter = PeakMeter(gauge_for(self.device), lambda: self.weights_bytes)
        self.lock = threading.Condition()
        self.loading = threading.Lock()
        self.on_device: dict[str, PackedModule | DeviceObject] = {}
        self.host = HostCache(host_budget_bytes)
        self.pending: dict[str, PendingComponent] = {}
        self.run_keys: frozenset[str] = frozenset()
        self._clock = clock
        self._names: dict[str, str] = {}
        self._since: dict[str, float] = {}

    # What is there

    def resident(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes on the device, least recently used first; last those that are on their way there."""
        with self.lock:
            there = [(key, resident.device_bytes) for key, resident in self.on_device.items()]
            return (*there, *((key, each.weights_bytes) for key, each in self.pending.items() if each.to_device))

    @property
    def weights_bytes(self) -> int:
        """What weights take of the memory that is measured: the device's; of a CPU, the host's copies too."""
        with self.lock:
            device_bytes = sum(resident.device_bytes for resident in self.on_device.values())
            device_bytes += sum(coming.device_bytes for coming in self.pending.values())
            return device_bytes + (self.host.total_bytes if self.device.type == "cpu" else 0)

    def component_statuses(self) -> tuple[ComponentStatus, ...]:
        """All that is on the device or has a copy in host memory."""
        with self.lock:
            sizes = {key: resident.device_bytes for key, resident in self.on_device.items()}
            copies = self.host.copies
            return tuple(
                ComponentStatus(
                    key=key,
                    name=self._names[key],
                    device_bytes=sizes.get(key, 0),
                    host_bytes=copies[key].weights_bytes if key in copies else 0,
                    page_locked=key in copies and copies[key].page_locked,
                    streamed=key in copies and copies[key].kept_bytes is not None,
                    since_at=self._since[key],
                )
                for key in {**copies, **sizes}
            )

    # What comes and goes

    def _record(self, component: Component) -> None:
        """From now on it is here: on the device, or in the host's memory."""
        self._since[component.key], self._names[component.key] = self._clock(), component.name

    def _move_unmeasured(self, move: Callable[[], object], made: PackedModule | DeviceObject | None = None) -> None:
        """Weights of no run come or go while a run may be measured: its peaks are its own before, and after."""
        self.meter.record()
        if isinstance(made, PackedModule):
            made.fault_in_pages()
        move()
        self.meter.restart(give_back=False)

    def evict(self, key: str) -> None:
        """Give the component's bytes on the device back; nothing happens where it is not resident."""
        with self.lock:
            if coming := self.pending.get(key):
                coming.cancel()
                self.lock.wait_for(lambda: key not in self.pending)
            if key in self.on_device:
                self._move_unmeasured(lambda: self.on_device.pop(key).free_device())

    def cancel_prefetches(self) -> None:
        """What another thread brings is not wanted any more."""
        with self.lock:
            for coming in self.pending.values():
                coming.cancel()

    def evict_all(self) -> None:
        with self.lock:
            for key in (*self.on_device, *self.pending):
                self.evict(key)

    def clear(self) -> None:
        """Give everything back, the host copies too."""
        with self.lock:
            self.evict_all()
            self.host.clear()


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
        self.mode = ExecutionMode()
        self.phase: str | None = None
        self.embeddings = EmbeddingCache()
        self._link = DeviceTransfer(self.device)

    def begin_run(self, way: ExecutionMode, keys: Iterable[str] = ()) -> None:
        """A run starts, in this way; it may hold components with these keys."""
        with self.lock:
            self.mode, self.phase, self.run_keys = way, None, frozenset(keys)
            self.meter.begin()

    def enter_phase(self, phase: str) -> None:
        """The run goes into a phase. Components of the run that the phase does not need go, but in tier `resident`."""
        if phase == self.phase:
            return
        with self.lock:
            self.phase = phase
            self.meter.enter(phase)
            phases = dict(self.mode.phases)
            if self.mode.tier != "resident" and phase in phases:
                for key in {key for keys in phases.values() for key in keys} - set(phases[phase]):
                    self.evict(key)
            self.meter.restart()

    def end_run(self) -> tuple[Peak, ...]:
        """The run has ended: its peaks."""
        with self.lock:
            return self.meter.end()

    def release_cache(self) -> None:
        """The run is over: what the allocator keeps for the next one goes back, so that the driver tells of others."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def acquire(self, component: Component, load: Callable[[Component], Any]) -> Any:
        """What `load` made of the component, with its weights on the device; `load` runs only if no copy is here.

        `load` returns a module on the host, or any other object (an ONNX session) already on the device.
        Whatever it raises comes out, and so does running out of memory: then the component is not resident.
        """
        with self.lock:
            self._enter_phase_for(component.key)
            self.lock.wait_for(lambda: component.key not in self.pending)
            self.meter.record()  # before any weights move: they are not counted, and the peak is that of before
            kept_bytes = dict(self.mode.streamed_bytes).get(component.key) if self.copies_to_device else None
            resident = self.on_device.pop(component.key, None)
            if isinstance(resident, PackedModule) and resident.kept_bytes != kept_bytes:
                resident.free_device()
                resident = None
            if resident is None:
                self._record(component)
                # A tensor made in inference mode could never again be pointed elsewhere.
                with torch.inference_mode(False), torch.no_grad():
                    resident = self._load(component, load, kept_bytes)
            self.on_device[component.key] = resident
            self.meter.restart()
            return resident.loaded

    def _enter_phase_for(self, key: str) -> None:
        """A component of a later phase is wanted: that phase begins."""
        if self.phase is not None and key in dict(self.mode.phases).get(self.phase, (key,)):
            return
        names = [name for name, _ in self.mode.phases]
        later = self.mode.phases[names.index(self.phase) + 1 if self.phase in names else 0 :]
        if following := next((name for name, keys in later if key in keys), None):
            self.enter_phase(following)

    def _load(
        self, component: Component, load: Callable[[Component], Any], kept_bytes: int | None
    ) -> PackedModule | DeviceObject:
        packed = self.host.find(component.key)
        if packed is None:
            if self.copies_to_device:
                self._make_room(component.weights_bytes)
            with self.loading:
                loaded = load(component)
            if not isinstance(loaded, torch.nn.Module):
                return DeviceObject(loaded, component.weights_bytes)
            packed = PackedModule.of(loaded)
            if not self.copies_to_device:
                return packed
            packed.page_lock(self.device)
            self.host.keep(component.key, packed)
        device_copy = (
            ResidentCopy(packed, self._link) if kept_bytes is None else StreamedCopy(packed, self._link, kept_bytes)
        )
        packed.attach(device_copy, kept_bytes)
        return packed

    def _make_room(self, needed_bytes: int) -> None:
        """In the host's memory, for a run: what is brought for a later one gives way."""
        try:
            self.host.make_room(needed_bytes, {*self.on_device, *self.pending})
        except HostMemoryExhausted:
            if not self.pending:
                raise
            for key in tuple(self.pending):
                self.evict(key)
            self.host.make_room(needed_bytes, self.on_device.keys())
