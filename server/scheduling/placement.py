"""Placement: the mode and device in which a job fits, its evictions, the next attempt after out of memory. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipelines.base import TIERS, ExecutionMode
from server.scheduling.need import Need
from server.scheduling.types import DeviceState, Evict

GIB = 2**30


def fits(need: Need, device: DeviceState) -> bool:
    """Whether the device, with nothing else on it, could run the job in some way."""
    return choose_mode(need, device) is not None


def choose_mode(need: Need, device: DeviceState) -> ExecutionMode | None:
    """The way in which the job finishes soonest there; ways that change no pixel go before tiled decoding.

    None: it fits in none.
    """
    if need.devices is not None and device.id not in need.devices:
        return None
    if device.host_budget_bytes is not None and largest_component_bytes(need) > device.host_budget_bytes:
        return None
    fitting = [way for way in need.possible if need.bytes_in(way) <= device.budget_bytes]
    return min(fitting, key=lambda way: (way.tiled, load_seconds(need, device, way)), default=None)


def mode_for_worker(need: Need, device: DeviceState) -> ExecutionMode:
    """The chosen way with all that the worker must know of it. The device must be able to run the job."""
    way = choose_mode(need, device) or ExecutionMode()
    phases = tuple((phase.name, phase.keys) for phase in need.phases)
    return replace(way, phases=phases, streamed_bytes=need.kept(device.budget_bytes, way))


def load_seconds(need: Need, device: DeviceState, way: ExecutionMode) -> float:
    """What the way adds to the run itself: weights that cross the link. What streaming hides behind work is unknown.

    resident: what is missing. staged: all but what the first phase finds there. streamed: the same, and the blocks
    that are not kept once more in every pass.
    """
    if way.tier == "resident":
        return device.missing_bytes(need) / device.link_bytes_per_s
    resident = dict(device.resident)
    there = sum(min(need.sizes.get(key, 0), resident.get(key, 0)) for key in need.phases[0].keys)
    moved_bytes = need.weights_bytes - there
    for key, kept_bytes in need.kept(device.budget_bytes, way):
        moved_bytes += (need.passes - 1) * (sum(dict(need.blocks)[key]) - kept_bytes)
    return moved_bytes / device.link_bytes_per_s


def best_device(need: Need, idle: Iterable[DeviceState]) -> DeviceState:
    """Of the devices that can run the job, the one where it finishes soonest, then with the most room.

    Raises ValueError if none can: ask `able` first.
    """
    ways = [(device, way) for device in idle if (way := choose_mode(need, device))]
    device, _ = min(ways, key=lambda pair: (pair[1].tiled, load_seconds(need, *pair), -pair[0].free_bytes))
    return device


def ranked_devices(need: Need, idle: Iterable[DeviceState]) -> list[tuple[float, DeviceState]]:
    """The devices that could run the job now, best first, with the seconds that loading adds if nothing was prefetched.

    Prefetching is for the job that is to come, and no reason for another one to come in its place.
    """
    ways = [(device, way) for device in idle if (way := choose_mode(need, device))]
    timed = [(way.tiled, load_seconds(need, device, way), -device.free_bytes, device, way) for device, way in ways]
    best_first = sorted(timed, key=lambda option: option[:3])
    return [
        (load_seconds(need, device.without_prefetched(), way) if device.prefetched else load_s, device)
        for _, load_s, _, device, way in best_first
    ]


def evictions(need: Need, device: DeviceState) -> list[Evict]:
    """What makes room for the job: the least recently used first, nothing that it needs, no more than must be.

    A streamed job takes all there is: a block that stays is worth more than another job's weights.
    """
    way = choose_mode(need, device) or ExecutionMode()
    resident = dict(device.resident)
    own_bytes = sum(min(resident[key], need.sizes[key]) for key in need.keys & resident.keys())
    wanted_bytes = device.budget_bytes if need.kept(device.budget_bytes, way) else need.bytes_in(way)
    short_bytes = wanted_bytes - own_bytes - device.free_bytes
    chosen = []
    for key, weights_bytes in device.resident:
        if short_bytes <= 0:
            break
        if key not in need.keys:
            chosen.append(Evict(device.id, key))
            short_bytes -= weights_bytes
    return chosen


def after_start(device: DeviceState, need: Need, evicted: Iterable[str]) -> DeviceState:
    """The device once `evicted` are gone and the job's components are loaded, busy."""
    gone = {*evicted} | need.keys
    kept = tuple(entry for entry in device.resident if entry[0] not in gone)
    return replace(device, resident=(*kept, *need.components), idle=False)


def refusal(need: Need, devices: Iterable[DeviceState]) -> str | None:
    """Why no device here could ever hold this, or None if one could, were no other program on it."""
    devices = [device.without_other_processes for device in devices]
    if any(fits(need, device) for device in devices):
        return None
    largest_bytes = max((device.budget_bytes for device in devices), default=0)
    if need.total_bytes > largest_bytes:
        return f"needs {need.total_bytes / GIB:.1f} GiB; the largest device here has {largest_bytes / GIB:.1f} GiB"
    host_bytes = max((device.host_budget_bytes or 0 for device in devices), default=0)
    return (
        f"has a component of {largest_component_bytes(need) / GIB:.1f} GiB; "
        f"host memory for the copies of weights is {host_bytes / GIB:.1f} GiB"
    )


def largest_component_bytes(need: Need) -> int:
    """Bytes of the largest component."""
    return max(need.sizes.values(), default=0)


FALLBACK_ORDER = tuple(ExecutionMode(tier, tiled) for tier in TIERS for tiled in (False, True))
"""From the most bytes to the fewest: tiled decoding comes before the next tier."""


@dataclass(frozen=True)
class Attempt:
    """One try, which ran out of memory or is to come."""

    device: str
    way: ExecutionMode


def next_attempt(tried: Sequence[Attempt], need: Need, devices: Sequence[DeviceState]) -> Attempt | None:
    """The try after those in `tried`, of which the last has just failed; `need` is the job's own, as at its submit.

    1. The same way once more: all else on the device was freed meanwhile, and another program may have been too.
    2. Then, on the same device, tiled decoding; 3. staged; 4. streamed; as far as the model can be run so.
    5. Then another device that could hold the job, in the way it would choose, and down from there again.
    6. None: it cannot be run here. It runs at fal, where that is allowed; else it is failed and refunded.
    """
    here = [rung.way for rung in tried if rung.device == tried[-1].device]
    if len(here) == 1:
        return tried[-1]
    for way in FALLBACK_ORDER[FALLBACK_ORDER.index(here[-1]) + 1 :]:
        rung = Attempt(tried[-1].device, way)
        if way in need.possible and any(choose_mode(restricted_to(need, rung), device) for device in devices):
            return rung
    seen = {rung.device for rung in tried}
    for device in devices:
        best_way = choose_mode(need, device)
        if best_way and device.id not in seen:
            return Attempt(device.id, best_way)
    return None


def restricted_to(need: Need, rung: Attempt) -> Need:
    """The need of a job that is to be tried on this rung and nowhere else."""
    return replace(need, ways=(rung.way,), devices=frozenset({rung.device}))
