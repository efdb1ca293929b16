"""What of which component is where: on the device, in the host's memory, or on its way there."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from pipelines.base import Component, Held
from pipelines.coming import Coming
from pipelines.hostram import HostCopies
from pipelines.meter import Meter, gauge_for
from pipelines.packing import PackedModule


class Opaque:
    """An object that keeps its own weights on the device. Dropped when evicted, so let nobody else keep it."""

    def __init__(self, loaded: Any, weights_bytes: int) -> None:
        self.loaded = loaded
        self.device_bytes = weights_bytes

    def leave_device(self) -> None:
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
        self.meter = Meter(gauge_for(self.device), lambda: self.weights_bytes)
        self.lock = threading.Condition()
        self.loading = threading.Lock()
        self.on_device: dict[str, PackedModule | Opaque] = {}
        self.host = HostCopies(host_budget_bytes)
        self.coming: dict[str, Coming] = {}
        self.run_keys: frozenset[str] = frozenset()
        self._clock = clock
        self._names: dict[str, str] = {}
        self._since: dict[str, float] = {}

    # What is there

    def resident(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes on the device, least recently used first; last those that are on their way there."""
        with self.lock:
            there = [(key, resident.device_bytes) for key, resident in self.on_device.items()]
            return (*there, *((key, each.weights_bytes) for key, each in self.coming.items() if each.to_device))

    @property
    def weights_bytes(self) -> int:
        """What weights take of the memory that is measured: the device's; of a CPU, the host's copies too."""
        with self.lock:
            device_bytes = sum(resident.device_bytes for resident in self.on_device.values())
            device_bytes += sum(coming.device_bytes for coming in self.coming.values())
            return device_bytes + (self.host.total_bytes if self.device.type == "cpu" else 0)

    def held(self) -> tuple[Held, ...]:
        """All that is on the device or has a copy in host memory."""
        with self.lock:
            sizes = {key: resident.device_bytes for key, resident in self.on_device.items()}
            copies = self.host.copies
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

    # What comes and goes

    def note(self, component: Component) -> None:
        """From now on it is here: on the device, or in the host's memory."""
        self._since[component.key], self._names[component.key] = self._clock(), component.name

    def moved(self, move: Callable[[], object], made: PackedModule | Opaque | None = None) -> None:
        """Weights of no run come or go while a run may be measured: its peaks are its own before, and after."""
        self.meter.lap()
        if isinstance(made, PackedModule):
            made.touch()
        move()
        self.meter.restart(give_back=False)

    def evict(self, key: str) -> None:
        """Give the component's bytes on the device back; nothing happens where it is not resident."""
        with self.lock:
            if coming := self.coming.get(key):
                coming.call_off()
                self.lock.wait_for(lambda: key not in self.coming)
            if key in self.on_device:
                self.moved(lambda: self.on_device.pop(key).leave_device())

    def call_off_all(self) -> None:
        """What another thread brings is not wanted any more."""
        with self.lock:
            for coming in self.coming.values():
                coming.call_off()

    def evict_all(self) -> None:
        with self.lock:
            for key in (*self.on_device, *self.coming):
                self.evict(key)

    def clear(self) -> None:
        """Give everything back, the host copies too."""
        with self.lock:
            self.evict_all()
            self.host.clear()
