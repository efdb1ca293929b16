"""What is on this worker's device: each component's weights in one buffer, loaded once and shared by its key."""

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.base import Component, Held, Peak, Way
from pipelines.coming import CalledOff, Coming
from pipelines.embeddings import Embeddings
from pipelines.hostram import HostCopies, HostRamShort
from pipelines.link import Link, SideLink
from pipelines.meter import Meter, gauge_for
from pipelines.packing import PackedModule, Whole
from pipelines.streaming import Streamed


class Residency:
    """The components on one device, least recently used first. A worker runs one job at a time, on one thread.

    On a CPU the host is the device, so evicting drops the weights and the next `hold` reads the files again.
    Elsewhere the host keeps a page-locked copy: coming back is one copy, evicting copies nothing. Those copies stay
    within `host_budget_bytes`, where it is given: the least recently used go first.

    A run follows the `Way` of `begin()`. In the tiers `staged` and `streamed` a phase drops what it does not need of
    the components of the run; others' stay, since what was evicted for the run is gone already.

    One other thread may `fetch` components that a later run needs. `_books` guards what is where. The run has it for
    as long as it moves weights; the other thread for moments, never while it reads files or copies: the run goes first.
    What it brings is in `_coming`: whoever wants to hold that waits for it, whoever evicts it calls it off.
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
        self._books = threading.Condition()
        self._loading = threading.Lock()
        self._coming: dict[str, Coming] = {}
        self._run_keys: frozenset[str] = frozenset()

    # One run

    def begin(self, way: Way, keys: Iterable[str] = ()) -> None:
        """A run starts, in this way; it may hold components with these keys."""
        with self._books:
            self.way, self.phase, self._run_keys = way, None, frozenset(keys)
            self.meter.begin()

    def enter(self, phase: str) -> None:
        """The run goes into a phase. Components of the run that the phase does not need go, but in tier `resident`."""
        if phase == self.phase:
            return
        with self._books:
            self.phase = phase
            self.meter.enter(phase)
            phases = dict(self.way.phases)
            if self.way.tier != "resident" and phase in phases:
                for key in {key for keys in phases.values() for key in keys} - set(phases[phase]):
                    self.evict(key)
            self.meter.restart()

    def end(self) -> tuple[Peak, ...]:
        """The run has ended: its peaks."""
        with self._books:
            return self.meter.end()

    def hold(self, component: Component, load: Callable[[Component], Any]) -> Any:
        """What `load` made of the component, with its weights on the device; `load` runs only if no copy is here.

        `load` returns a module on the host, or any other object (an ONNX session) already on the device.
        Whatever it raises comes out, and so does running out of memory: then the component is not resident.
        """
        with self._books:
            self._meet(component.key)
            self._books.wait_for(lambda: component.key not in self._coming)
            self.meter.lap()  # before any weights move: they are not counted, and the peak is that of before
            kept_bytes = dict(self.way.kept).get(component.key) if self._copies_to_device else None
            resident = self._resident.pop(component.key, None)
            if isinstance(resident, PackedModule) and resident.kept_bytes != kept_bytes:
                resident.leave_device()
                resident = None
            if resident is None:
                self._note(component)
                # A tensor made in inference mode could never again be pointed elsewhere.
                with torch.inference_mode(False), torch.no_grad():
                    resident = self._bring(component, load, kept_bytes)
            self._resident[component.key] = resident
            self.meter.restart()
            return resident.loaded

    # What a later run needs, brought by another thread

    def fetch(self, component: Component, make: Callable[[Component], "PackedModule | Opaque"], coming: Coming) -> None:
        """Bring a component to the device, or (`coming.to_device` is False) into host memory only.

        `make` runs if the host has no copy. Raises whatever it raises, HostRamShort, and CalledOff: then nothing came.
        """
        key = component.key
        with self._books:
            if key in self._resident or (key in self._host.copies and not coming.to_device):
                return
            packed = self._host.find(key)
            if packed is None and self._copies_to_device:
                self._host.make_room(component.weights_bytes, {*self._resident, *self._run_keys})
                self._host.promised[key] = component.weights_bytes
            self._coming[key] = coming
        try:
            with torch.no_grad():
                self._fetch(component, packed, make, coming)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they keep what was on its way
            raise
        finally:
            with self._books:
                if coming.device_bytes and key not in self._resident:
                    self._moved(lambda: coming.take(0))
                    if torch.cuda.is_initialized():
                        torch.cuda.empty_cache()
                self._host.promised.pop(key, None)
                del self._coming[key]
                self._books.notify_all()

    def _fetch(
        self,
        component: Component,
        packed: PackedModule | None,
        make: Callable[[Component], "PackedModule | Opaque"],
        coming: Coming,
    ) -> None:
        if packed is None:
            made = self._make(component, make, coming)
            if isinstance(made, Opaque) or not self._copies_to_device:
                return
            packed = made
        if coming.to_device:
            self._copy(component.key, packed, coming)

    def _make(
        self, component: Component, make: Callable[[Component], "PackedModule | Opaque"], coming: Coming
    ) -> "PackedModule | Opaque":
        """Load it; then it is in the host's memory, or, where the host keeps no copy of it, on the device."""
        made = self._loaded(lambda: make(component), coming)
        if isinstance(made, PackedModule) and self._copies_to_device:
            made.page_lock(self.device)
        with self._books:
            if coming.off:
                if isinstance(made, PackedModule):
                    made.leave_host()
                raise CalledOff
            self._note(component)
            if isinstance(made, PackedModule) and self._copies_to_device:
                self._moved(lambda: self._host.keep(component.key, made))
            else:
                self._moved(lambda: self._arrived(component.key, made), made)
        return made

    def _loaded(self, make: Callable[[], Any], coming: Coming) -> Any:
        with self._books:
            self._check(coming)
            coming.loads = True
        try:
            return make()
        except Exception:
            self._check(coming)  # it was stopped
            raise
        finally:
            coming.loads = False

    def _copy(self, key: str, packed: PackedModule, coming: Coming) -> None:
        """From the host's memory to the device, block by block."""
        with self._books:
            self._check(coming)
            buffer = torch.empty_like(packed.host, device=self.device)
            self._moved(lambda: coming.take(buffer.nbytes))
        lodging = Whole(packed, SideLink(self.device, lambda: self._check(coming)), buffer)
        with self._books:
            packed.lodge(lodging)
            if coming.off:
                packed.leave_device()
                raise CalledOff
            coming.take(0)
            self._arrived(key, packed)

    def _arrived(self, key: str, made: "PackedModule | Opaque") -> None:
        self._resident = {key: made, **self._resident}  # no run has used it yet: the first to go

    def _check(self, coming: Coming) -> None:
        with self._books:
            if coming.off:
                raise CalledOff

    def _moved(self, move: Callable[[], object], made: "PackedModule | Opaque | None" = None) -> None:
        """Weights of no run come or go while a run may be measured: its peaks are its own before, and after."""
        self.meter.lap()
        if isinstance(made, PackedModule):
            made.touch()
        move()
        self.meter.restart(give_back=False)

    @contextmanager
    def loading_beside(self) -> Iterator[None]:
        """Another thread loads in this process. Not while the run does: some loaders change torch for all threads.

        A CPU's run is not measured meanwhile: it cannot tell what it takes itself.
        """
        self._measure(False)
        try:
            with self._loading:
                yield
        finally:
            self._measure(True)

    def _measure(self, on: bool) -> None:
        if self.device.type == "cpu":
            with self._books:
                self.meter.lap()
                self.meter.blind = not on
                self.meter.restart(give_back=False)

    def rest(self) -> None:
        """The run is over: what the allocator keeps for the next one goes back, so that the driver tells of others."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # What is there

    def evict(self, key: str) -> None:
        """Give the component's bytes on the device back; nothing happens where it is not resident."""
        with self._books:
            if coming := self._coming.get(key):
                coming.call_off()
                self._books.wait_for(lambda: key not in self._coming)
            if key in self._resident:
                self._moved(lambda: self._resident.pop(key).leave_device())

    def resident(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes on the device, least recently used first; last those that are on their way there."""
        with self._books:
            there = [(key, resident.device_bytes) for key, resident in self._resident.items()]
            return (*there, *((key, each.weights_bytes) for key, each in self._coming.items() if each.to_device))

    @property
    def weights_bytes(self) -> int:
        """What weights take of the memory that is measured: the device's; of a CPU, the host's copies too."""
        with self._books:
            device_bytes = sum(resident.device_bytes for resident in self._resident.values())
            device_bytes += sum(coming.device_bytes for coming in self._coming.values())
            return device_bytes + (self._host.total_bytes if self.device.type == "cpu" else 0)

    def held(self) -> tuple[Held, ...]:
        """All that is on the device or has a copy in host memory."""
        with self._books:
            sizes = {key: resident.device_bytes for key, resident in self._resident.items()}
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
                for key in {**copies, **sizes}
            )

    def call_off_all(self) -> None:
        """What another thread brings is not wanted any more."""
        with self._books:
            for coming in self._coming.values():
                coming.call_off()

    def evict_all(self) -> None:
        with self._books:
            for key in (*self._resident, *self._coming):
                self.evict(key)

    def clear(self) -> None:
        """Give everything back, the host copies too."""
        with self._books:
            self.evict_all()
            self._host.clear()

    def _note(self, component: Component) -> None:
        self._since[component.key], self._names[component.key] = self._clock(), component.name

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
                self._make_room(component.weights_bytes)
            with self._loading:
                loaded = load(component)
            if not isinstance(loaded, torch.nn.Module):
                return Opaque(loaded, component.weights_bytes)
            packed = PackedModule.of(loaded)
            if not self._copies_to_device:
                return packed
            packed.page_lock(self.device)
            self._host.keep(component.key, packed)
        lodging = Whole(packed, self._link) if kept_bytes is None else Streamed(packed, self._link, kept_bytes)
        packed.lodge(lodging, kept_bytes)
        return packed

    def _make_room(self, needed_bytes: int) -> None:
        """In the host's memory, for a run: what is brought for a later one gives way."""
        try:
            self._host.make_room(needed_bytes, {*self._resident, *self._coming})
        except HostRamShort:
            if not self._coming:
                raise
            for key in tuple(self._coming):
                self.evict(key)
            self._host.make_room(needed_bytes, self._resident.keys())


class Opaque:
    """An object that keeps its own weights on the device. Dropped when evicted, so let nobody else keep it."""

    def __init__(self, loaded: Any, weights_bytes: int) -> None:
        self.loaded = loaded
        self.device_bytes = weights_bytes

    def leave_device(self) -> None:
        self.loaded = None
