"""Where a job fits, and what must make room for it there. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from server.vram import Need

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device as the scheduler sees it. `resident` is (component key, bytes), least recently used first."""

    id: str
    budget_bytes: int
    resident: tuple[tuple[str, int], ...] = ()
    idle: bool = True

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - sum(weights_bytes for _, weights_bytes in self.resident)

    def missing_bytes(self, need: Need) -> int:
        """Weights that would have to be loaded before the job could run."""
        resident = {key for key, _ in self.resident}
        return sum(weights_bytes for key, weights_bytes in need.components if key not in resident)


@dataclass(frozen=True)
class Evict:
    device: str
    key: str


def best(need: Need, idle: Iterable[Device]) -> Device:
    """Of the devices that can hold the job, the one with the fewest bytes to load, then with the most room."""
    able = [device for device in idle if need.total_bytes <= device.budget_bytes]
    return min(able, key=lambda device: (device.missing_bytes(need), -device.free_bytes))


def evictions(need: Need, device: Device) -> list[Evict]:
    """What makes room for the job: the least recently used first, nothing that it needs, no more than must be."""
    short_bytes = device.missing_bytes(need) + need.working_bytes - device.free_bytes
    chosen = []
    for key, weights_bytes in device.resident:
        if short_bytes <= 0:
            break
        if key not in need.keys:
            chosen.append(Evict(device.id, key))
            short_bytes -= weights_bytes
    return chosen


def after(device: Device, need: Need, evicted: Iterable[str]) -> Device:
    """The device once `evicted` are gone and the job's components are loaded, busy."""
    gone = {*evicted} | need.keys
    kept = tuple(entry for entry in device.resident if entry[0] not in gone)
    return replace(device, resident=(*kept, *need.components), idle=False)


def refusal(need: Need, devices: Iterable[Device]) -> str | None:
    """Why no device here could ever hold this, or None if one could."""
    largest_bytes = max((device.budget_bytes for device in devices), default=0)
    if need.total_bytes <= largest_bytes:
        return None
    return f"needs {need.total_bytes / GIB:.1f} GiB; the largest device here has {largest_bytes / GIB:.1f} GiB"
