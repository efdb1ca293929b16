"""What others do with a queue, to compare with: no fairness, no patience. Same signature as `plan()`."""

from collections import Counter
from collections.abc import Iterable, Sequence

from server.scheduling.fairness import Shares
from server.scheduling.placement import best_device, evictions, fits
from server.scheduling.types import Action, DeviceState, Evict, Start, WaitingJob


def fifo(waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares) -> list[Action]:
    """The oldest job on the first idle device; a device keeps one model at a time, as most servers do."""
    actions: list[Action] = []
    idle = [device for device in devices if device.idle]
    for job in waiting:
        device = next((device for device in idle if fits(job.need, device)), None)
        if device:
            actions += [*(Evict(device.id, key) for key, _ in device.resident if key not in job.need.keys)]
            actions.append(Start(job.job_id, device.id))
            idle.remove(device)
    return actions


def lru(waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares) -> list[Action]:
    """The oldest job on the device that has most of its weights; what was used least recently makes room."""
    return in_order(waiting, devices)


def exhaustive(
    waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares
) -> list[Action]:
    """A device stays with its model until no job of it waits; then the model that most jobs wait for."""
    often = Counter(job.need.keys for job in waiting)
    actions: list[Action] = []
    left = list(waiting)
    for device in [device for device in devices if device.idle]:
        fitting = [job for job in left if fits(job.need, device)]
        if not fitting:
            continue
        job = min(fitting, key=lambda each: (device.missing_bytes(each.need) > 0, -often[each.need.keys]))
        actions += [*evictions(job.need, device), Start(job.job_id, device.id)]
        left.remove(job)
    return actions


def in_order(jobs: Iterable[WaitingJob], devices: Sequence[DeviceState]) -> list[Action]:
    actions: list[Action] = []
    idle = [device for device in devices if device.idle]
    for job in jobs:
        fitting = [device for device in idle if fits(job.need, device)]
        if fitting:
            device = best_device(job.need, fitting)
            actions += [*evictions(job.need, device), Start(job.job_id, device.id)]
            idle.remove(device)
        if not idle:
            break
    return actions
