"""Which job runs where, and what makes room for it. Pure: no clock, no I/O, no log."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from server.vram import Need

GIB = 2**30


@dataclass(frozen=True)
class Waiting:
    """A queued job. A plan reads a sequence of them, oldest first."""

    job_id: str
    need: Need


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


@dataclass(frozen=True)
class Start:
    job_id: str
    device: str


@dataclass(frozen=True)
class Refuse:
    """No device could hold the job, even with nothing else on it."""

    job_id: str
    need_bytes: int
    budget_bytes: int


Action = Evict | Start | Refuse


def plan(waiting: Sequence[Waiting], devices: Sequence[Device]) -> list[Action]:
    """What to do now, in order.

    1. The oldest job goes first.
    2. A job that no device could hold, even empty, is refused with the numbers.
    3. A job takes, of the idle devices that can hold it, the one with the fewest bytes to load; of those, the one with
       the most room; of those, the first.
    4. To make room there, components that the job does not need are evicted, the least recently used first, and no
       more than must be.
    5. A job that only busy devices could hold waits. A younger one may take an idle device that is too small for it:
       that delays nobody.
    """
    actions: list[Action] = []
    idle = {device.id: device for device in devices if device.idle}
    largest_bytes = max((device.budget_bytes for device in devices), default=None)
    for job in waiting:
        if not idle or largest_bytes is None:
            break
        need_bytes = job.need.total_bytes
        if need_bytes > largest_bytes:
            actions.append(Refuse(job.job_id, need_bytes, largest_bytes))
        elif need_bytes <= max(device.budget_bytes for device in idle.values()):
            device = _best(job.need, idle.values())
            actions += [*_evictions(job.need, device), Start(job.job_id, device.id)]
            del idle[device.id]
    return actions


def refusal(need: Need, devices: Iterable[Device]) -> str | None:
    """Why no device here could ever hold this, or None if one could."""
    largest_bytes = max((device.budget_bytes for device in devices), default=0)
    if need.total_bytes <= largest_bytes:
        return None
    return f"needs {need.total_bytes / GIB:.1f} GiB; the largest device here has {largest_bytes / GIB:.1f} GiB"


def reason(need: Need, devices: Iterable[Device]) -> str:
    """Why a queued job does not run yet, for a person."""
    able = [device for device in devices if device.budget_bytes >= need.total_bytes]
    if not able:
        return f"needs {need.total_bytes / GIB:.1f} GiB; no running device has as much"
    if any(device.idle for device in able):
        return "starts as soon as the jobs before it have"
    names = ", ".join(device.id for device in able)
    return f"needs {need.total_bytes / GIB:.1f} GiB; every device that can hold it is busy ({names})"


def after(device: Device, need: Need, evicted: Iterable[str]) -> Device:
    """The device once `evicted` are gone and the job's components are loaded, busy."""
    gone = {*evicted} | need.keys
    kept = tuple(entry for entry in device.resident if entry[0] not in gone)
    return replace(device, resident=(*kept, *need.components), idle=False)


def _best(need: Need, idle: Iterable[Device]) -> Device:
    able = [device for device in idle if need.total_bytes <= device.budget_bytes]
    return min(able, key=lambda device: (device.missing_bytes(need), -device.free_bytes))


def _evictions(need: Need, device: Device) -> list[Evict]:
    short_bytes = device.missing_bytes(need) + need.working_bytes - device.free_bytes
    evictions = []
    for key, weights_bytes in device.resident:
        if short_bytes <= 0:
            break
        if key not in need.keys:
            evictions.append(Evict(device.id, key))
            short_bytes -= weights_bytes
    return evictions
