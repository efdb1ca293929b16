"""Residency of components on one device: each is loaded once, shared by its key, evicted, prefetched and measured."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipelines.base import Component, ComponentStatus, ExecutionMode, Peak
from pipelines.residency.host_cache import EmbeddingCache, HostCache, HostMemoryExhausted
from pipelines.residency.packed import PackedModule, ResidentCopy
from pipelines.residency.peak_memory import PeakMeter, gauge_for
from pipelines.residency.streaming import StreamedCopy
from pipelines.residency.transfer import DeviceTransfer

Loaded = TypeVar("Loaded")


class PrefetchCancelled(Exception):
    """The prefetch was cancelled: by an eviction, by a run that needs the host memory, or at shutdown."""


class DeviceObject:
    """An object that allocates its weights on the device by itself (an ONNX session). Evicting it drops the reference.

    The memory is freed only if there is no other reference, so callers must not keep one between runs.
    """

    def __init__(self, loaded: Any, weights_bytes: int) -> None:
        self.loaded = loaded
        self.device_bytes = weights_bytes

    def free_device(self) -> None:
        self.loaded = None


class PendingComponent:
    """A component that is being prefetched. `device_bytes` is what it has allocated on the device so far.

    `host_copy` is the copy in host memory, if there was one. `stop` aborts a load that is under way, where possible.
    """

    def __init__(
        self,
        component: Component,
        to_device: bool,
        host_copy: PackedModule | None,
        stop: Callable[[], None],
        lock: threading.Condition,
    ) -> None:
        self.component, self.to_device, self.host_copy = component, to_device, host_copy
        self.device_bytes = 0
        self.cancelled = False
        self._loading = False
        self._stop, self._lock = stop, lock

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._loading:
                self._stop()

    def check(self) -> None:
        """A cancellation point: blocks while the running job moves weights, then raises PrefetchCancelled if due."""
        with self._lock:
            if self.cancelled:
                raise PrefetchCancelled

    def load(self, load: Callable[[], Loaded]) -> Loaded:
        """Calls `load` without the lock. Raises what it raises, or PrefetchCancelled if `cancel` stopped it."""
        with self._lock:
            self.check()
            self._loading = True
        try:
            return load()
        except Exception:
            self.check()
            raise
        finally:
            self._loading = False

    def reserve(self, device_bytes: int) -> None:
        self.device_bytes = device_bytes


class Residency:
    """The components on one device and their copies in host memory, least recently used first.

    On a CPU the host is the device: evicting drops the weights, and the next `acquire` reads the files again.
    Otherwise the host keeps a page-locked copy: an eviction copies nothing, a reload is one transfer. These copies
    stay within `host_budget_bytes`, if given; the least recently used are dropped first.

    A run follows the `ExecutionMode` given to `begin_run`. In the tiers `staged` and `streamed`, each phase evicts the
    components of this run that it does not need. Components of other models stay: the scheduler evicts those.

    Locking. Two threads use this object: one runs jobs, the other prefetches for the next job. A condition variable
    with a reentrant lock guards all tables.
    - The running job has priority: it holds the lock for as long as it moves weights, the prefetch thread only to
      update the tables, never while it reads files or copies.
    - A prefetch is `reserve`d, then `publish`ed or `abandon`ed; in between, its component is pending. `acquire` waits
      until the component is no longer pending. `evict` cancels the prefetch and waits in the same way.
    - Cancellation is cooperative: the prefetch thread checks before loading, before each block that it copies, and
      when it publishes (`PendingComponent.check`).
    - `loading` is held by a thread that loads in this process: some loaders change torch for all threads. The run takes
      it while it holds the condition's lock, so the prefetch thread must not wait for that lock while it has `loading`.
    """

    def __init__(
        self,
        device: str | torch.device,
        copies_to_device: bool | None = None,
        host_budget_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.device = torch.device(device)
        self.copies_to_device = self.device.type != "cpu" if copies_to_device is None else copies_to_device
        self.mode = ExecutionMode()
        self.embeddings = EmbeddingCache()
        self.loading = threading.Lock()
        self._lock = threading.Condition()
        self._on_device: dict[str, PackedModule | DeviceObject] = {}
        self._host = HostCache(host_budget_bytes)
        self._pending: dict[str, PendingComponent] = {}
        self._phase: str | None = None
        self._run_keys: frozenset[str] = frozenset()
        self._meter = PeakMeter(gauge_for(self.device), lambda: self.weights_bytes)
        self._transfer = DeviceTransfer(self.device)
        self._clock = clock
        self._names: dict[str, str] = {}
        self._since: dict[str, float] = {}

    # Status

    def resident(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes on the device, least recently used first; after them, those being prefetched to the device."""
        with self._lock:
            there = [(key, resident.device_bytes) for key, resident in self._on_device.items()]
            pending = [(key, each.component.weights_bytes) for key, each in self._pending.items() if each.to_device]
            return (*there, *pending)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights in the measured memory: the device's; on a CPU, with the copies in host memory."""
        with self._lock:
            device_bytes = sum(resident.device_bytes for resident in self._on_device.values())
            device_bytes += sum(pending.device_bytes for pending in self._pending.values())
            return device_bytes + (self._host.total_bytes if self.device.type == "cpu" else 0)

    def component_statuses(self) -> tuple[ComponentStatus, ...]:
        """Every component that is on the device or has a copy in host memory."""
        with self._lock:
            sizes = {key: resident.device_bytes for key, resident in self._on_device.items()}
            copies = self._host.copies
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

    # One run

    def begin_run(self, mode: ExecutionMode, keys: Iterable[str] = ()) -> None:
        """Starts a run in this mode. Prefetching does not drop copies of `keys`, the components that it may acquire."""
        with self._lock:
            self.mode, self._phase, self._run_keys = mode, None, frozenset(keys)
            self._meter.begin()

    def enter_phase(self, phase: str) -> None:
        """Enters a phase. Unless the tier is `resident`, evicts components of this run that the phase does not need."""
        if phase == self._phase:
            return
        with self._lock:
            self._phase = phase
            self._meter.enter(phase)
            phases = dict(self.mode.phases)
            if self.mode.tier != "resident" and phase in phases:
                for key in {key for keys in phases.values() for key in keys} - set(phases[phase]):
                    self.evict(key)
            self._meter.restart()

    def end_run(self) -> tuple[Peak, ...]:
        """Ends the run. Returns its peaks by phase."""
        with self._lock:
            return self._meter.end()

    def release_cache(self) -> None:
        """Returns unused cached memory, so that the driver's free-memory figure shows what other processes use."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def acquire(self, component: Component, load: Callable[[Component], Any]) -> Any:
        """Returns what `load` made of the component, with its weights on the device. Calls `load` if no copy exists.

        `load` returns a module on the host, or another object (an ONNX session) that is on the device already.
        Raises whatever `load` raises, and out-of-memory errors; the component is not resident then.
        """
        with self._lock:
            self._enter_phase_for(component.key)
            self._lock.wait_for(lambda: component.key not in self._pending)
            self._meter.record()  # before weights move: their loading is not part of the run's peak
            kept_bytes = dict(self.mode.streamed_bytes).get(component.key) if self.copies_to_device else None
            resident = self._on_device.pop(component.key, None)
            if isinstance(resident, PackedModule) and resident.kept_bytes != kept_bytes:
                resident.free_device()
                resident = None
            if resident is None:
                self._record(component)
                # Inference tensors could not be pointed at another buffer later.
                with torch.inference_mode(False), torch.no_grad():
                    resident = self._load(component, load, kept_bytes)
            self._on_device[component.key] = resident
            self._meter.restart()
            return resident.loaded

    def _enter_phase_for(self, key: str) -> None:
        """Enters the first later phase that needs the component, if the current phase does not."""
        if self._phase is not None and key in dict(self.mode.phases).get(self._phase, (key,)):
            return
        names = [name for name, _ in self.mode.phases]
        later = self.mode.phases[names.index(self._phase) + 1 if self._phase in names else 0 :]
        if following := next((name for name, keys in later if key in keys), None):
            self.enter_phase(following)

    def _load(
        self, component: Component, load: Callable[[Component], Any], kept_bytes: int | None
    ) -> PackedModule | DeviceObject:
        packed = self._host.find(component.key)
        if packed is None:
            if self.copies_to_device:
                self._make_host_room(component.weights_bytes)
            with self.loading:
                loaded = load(component)
            if not isinstance(loaded, torch.nn.Module):
                return DeviceObject(loaded, component.weights_bytes)
            packed = PackedModule.of(loaded)
            if not self.copies_to_device:
                return packed
            packed.page_lock(self.device)
            self._host.keep(component.key, packed)
        if kept_bytes is None:
            packed.attach(ResidentCopy(packed, self._transfer))
        else:
            packed.attach(StreamedCopy(packed, self._transfer, kept_bytes), kept_bytes)
        return packed

    def _make_host_room(self, needed_bytes: int) -> None:
        """Makes room in host memory for the run. Cancels and drops prefetches if that is the only way."""
        try:
            self._host.make_room(needed_bytes, {*self._on_device, *self._pending})
        except HostMemoryExhausted:
            if not self._pending:
                raise
            for key in tuple(self._pending):
                self.evict(key)
            self._host.make_room(needed_bytes, self._on_device.keys())

    # Eviction

    def evict(self, key: str) -> None:
        """Frees the component's memory on the device, and cancels its prefetch. Does nothing if it is not resident."""
        with self._lock:
            if pending := self._pending.get(key):
                pending.cancel()
                self._lock.wait_for(lambda: key not in self._pending)
            if key in self._on_device:
                with self._unmeasured():
                    self._on_device.pop(key).free_device()

    def evict_all(self) -> None:
        with self._lock:
            for key in (*self._on_device, *self._pending):
                self.evict(key)

    def clear(self) -> None:
        """Frees all memory of weights, including the copies in host memory."""
        with self._lock:
            self.evict_all()
            self._host.clear()

    # Prefetching, from the second thread

    def reserve(
        self, component: Component, to_device: bool, stop: Callable[[], None] = lambda: None
    ) -> PendingComponent | None:
        """Registers a prefetch and reserves its host memory. None if the component is where it should be already.

        Raises HostMemoryExhausted. Copies that the current run may need are not dropped to make room.
        """
        key = component.key
        with self._lock:
            if key in self._on_device or (key in self._host.copies and not to_device):
                return None
            host_copy = self._host.find(key)
            if host_copy is None and self.copies_to_device:
                self._host.reserve(key, component.weights_bytes, {*self._on_device, *self._run_keys})
            pending = PendingComponent(component, to_device, host_copy, stop, self._lock)
            self._pending[key] = pending
            return pending

    def publish(self, component: Component, made: PackedModule | DeviceObject) -> PackedModule | None:
        """Adds what a prefetch has loaded: to host memory or, if the host keeps no copy of it, as resident.

        Returns the module if a copy to the device is to follow; otherwise the prefetch is complete.
        Raises PrefetchCancelled, and frees the module.
        """
        key = component.key
        with self._lock:
            pending = self._pending[key]
            if pending.cancelled:
                if isinstance(made, PackedModule):
                    made.free_host()
                raise PrefetchCancelled
            self._record(component)
            with self._unmeasured():
                if isinstance(made, PackedModule) and self.copies_to_device:
                    self._host.keep(key, made)
                    if pending.to_device:
                        return made
                else:
                    if isinstance(made, PackedModule):
                        made.fault_in_pages()
                    self._add_unused(key, made)
            self._end_prefetch(key)
            return None

    def allocate(self, key: str, size_bytes: int) -> torch.Tensor:
        """Allocates device memory for a prefetched component, counted as its weights. Raises PrefetchCancelled."""
        with self._lock:
            pending = self._pending[key]
            pending.check()
            with self._unmeasured():
                buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
                pending.reserve(buffer.nbytes)
            return buffer

    def publish_copy(self, key: str, packed: PackedModule, device_copy: ResidentCopy) -> None:
        """Makes a prefetched component resident, once it was copied. Raises PrefetchCancelled, and frees the copy."""
        with self._lock:
            packed.attach(device_copy)
            if self._pending[key].cancelled:
                packed.free_device()
                raise PrefetchCancelled
            self._add_unused(key, packed)
            self._end_prefetch(key)

    def abandon(self, key: str) -> None:
        """Ends a prefetch that failed or was cancelled, and releases what it had reserved."""
        with self._lock:
            if (pending := self._pending.get(key)) and pending.device_bytes:
                with self._unmeasured():  # the buffer itself was dropped by the caller
                    pending.reserve(0)
                    if torch.cuda.is_initialized():
                        torch.cuda.empty_cache()
            self._end_prefetch(key)

    def cancel_prefetches(self) -> None:
        with self._lock:
            for pending in self._pending.values():
                pending.cancel()

    @contextmanager
    def pause_metering(self) -> Iterator[None]:
        """On a CPU, records no peaks within the block: memory that the prefetch thread allocates is not the run's."""
        if self.device.type != "cpu":
            yield
            return
        with self._lock:
            self._meter.pause()
        try:
            yield
        finally:
            with self._lock:
                self._meter.resume()

    # With the lock held

    def _record(self, component: Component) -> None:
        """Records the name of a component, and when its weights arrived on the device or in host memory."""
        self._since[component.key], self._names[component.key] = self._clock(), component.name

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        """Weights that are moved within the block do not count as working memory of a running job."""
        self._meter.record()
        yield
        self._meter.restart(give_back=False)

    def _add_unused(self, key: str, made: PackedModule | DeviceObject) -> None:
        """Adds it as the least recently used, the first to evict: no run has used it yet."""
        self._on_device = {key: made, **self._on_device}

    def _end_prefetch(self, key: str) -> None:
        self._host.release(key)
        self._pending.pop(key, None)
        self._lock.notify_all()
