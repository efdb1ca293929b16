"""When each waiting job will start, and where, if nothing more comes: the plan, lived through ahead of time. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from server.scheduling.fairness import FairShareAccounting
from server.scheduling.need import Need
from server.scheduling.placement import fits
from server.scheduling.plan import Policy, plan
from server.scheduling.simulation import Simulation
from server.scheduling.types import GIB, DeviceState, WaitingJob

HORIZON, HORIZON_PER_USER = 60, 20
"""So many jobs are foreseen one by one, so many of a line; those behind them by the work that is before them."""


@dataclass(frozen=True)
class QueuePosition:
    """A place in the queue, 1 for the next. Without an instant if no device that could take the job is there."""

    position: int
    start_at: float | None = None
    device: str | None = None


def forecast(
    waiting: Sequence[WaitingJob],
    devices: Sequence[DeviceState],
    free_at: Mapping[str, float],
    now: float,
    turns: FairShareAccounting,
    policy: Policy = Policy(),
) -> dict[str, QueuePosition]:
    """By job. `free_at` has every device that runs, or soon will; others take no jobs."""
    near = within_horizon(waiting)
    boxes = {device.id: replace(device, idle=False) for device in devices if device.id in free_at}
    world = Simulation(
        partial(plan, policy=policy),
        boxes,
        now=now,
        busy_until=dict(free_at),
        turns=turns.copy_with(near),
        waiting={job.job_id: job for job in near},
    )
    runs = world.live([])
    places = {run.job.job_id: QueuePosition(index, run.starts_at, run.device) for index, run in enumerate(runs, 1)}
    return places | dict(beyond_horizon(waiting, places, world.busy_until_then(), len(boxes)))


def within_horizon(waiting: Sequence[WaitingJob]) -> list[WaitingJob]:
    """The heads of all lines, in turn, until there are enough; oldest first."""
    seen: Counter[str] = Counter()
    ranked = []
    for index, job in enumerate(waiting):
        if seen[job.line] < HORIZON_PER_USER:
            ranked.append((-job.priority, seen[job.line], index))
        seen[job.line] += 1
    return [waiting[index] for index in sorted(index for _, _, index in sorted(ranked)[:HORIZON])]


def beyond_horizon(
    waiting: Sequence[WaitingJob], places: Mapping[str, QueuePosition], from_at: float, devices: int
) -> Iterable[tuple[str, QueuePosition]]:
    """The others, in the order in which they came."""
    position, at = len(places), from_at
    for job in waiting:
        if job.job_id not in places:
            position += 1
            yield job.job_id, QueuePosition(position, at if devices else None)
            at += job.expected_s / max(1, devices)


def reason(
    need: Need,
    place: QueuePosition,
    devices: Iterable[DeviceState],
    titles: Mapping[str, str],
    now: float,
    prepared: str | None = None,
) -> str:
    """Why a queued job does not run yet, for a person. `prepared` names a device that prefetches its weights."""
    text = wait_reason(need, place, devices, titles, now)
    return f"{text}; {prepared} loads its weights meanwhile" if prepared else text


def wait_reason(
    need: Need, place: QueuePosition, devices: Iterable[DeviceState], titles: Mapping[str, str], now: float
) -> str:
    wanted = f"needs {need.total_bytes / GIB:.1f} GiB"
    devices = list(devices)
    fitting = [device for device in devices if fits(need, device)]
    taken = [device for device in devices if fits(need, device.without_other_processes)]
    if taken and not fitting:
        told = [f"{device.external_bytes / GIB:.1f} GiB of {titles[device.id]}" for device in taken]
        return f"{wanted}; other programs have {' and '.join(told)}"
    if not fitting:
        return f"{wanted}; no running device has as much"
    if any(device.idle for device in fitting):
        return "starts as soon as the jobs before it have"
    if place.start_at is None or place.device is None:
        return f"{wanted}; every device that can hold it is busy ({', '.join(titles[each.id] for each in fitting)})"
    device = next(device for device in fitting if device.id == place.device)
    wait = f"in about {max(1, round(place.start_at - now))} s"
    return f"{wanted}; {titles[device.id]} has {device.budget_bytes / GIB:.1f} GiB {wait}"
