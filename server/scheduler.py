"""Which job runs where, and when. Pure: no clock, no I/O, no log."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.placement import GIB, Device, Evict, after, best, evictions, refusal
from server.vram import Need

__all__ = ["Action", "Device", "Evict", "Refuse", "Start", "Waiting", "after", "plan", "reason", "refusal"]


@dataclass(frozen=True)
class Waiting:
    """A queued job. A plan reads a sequence of them, oldest first."""

    job_id: str
    need: Need


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
    largest_bytes = max((device.budget_bytes for device in devices), default=0)
    for job in waiting:
        if not idle:
            break
        need_bytes = job.need.total_bytes
        if need_bytes > largest_bytes:
            actions.append(Refuse(job.job_id, need_bytes, largest_bytes))
        elif need_bytes <= max(device.budget_bytes for device in idle.values()):
            device = best(job.need, idle.values())
            actions += [*evictions(job.need, device), Start(job.job_id, device.id)]
            del idle[device.id]
    return actions


def reason(need: Need, devices: Iterable[Device]) -> str:
    """Why a queued job does not run yet, for a person."""
    able = [device for device in devices if device.budget_bytes >= need.total_bytes]
    if not able:
        return f"needs {need.total_bytes / GIB:.1f} GiB; no running device has as much"
    if any(device.idle for device in able):
        return "starts as soon as the jobs before it have"
    names = ", ".join(device.id for device in able)
    return f"needs {need.total_bytes / GIB:.1f} GiB; every device that can hold it is busy ({names})"
