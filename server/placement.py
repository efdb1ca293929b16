"""Where a job fits, in which way, and what must make room for it there. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipelines.base import Way
from server.vram import Need

GIB = 2**30
LINK_BYTES_PER_S = 12e9
"""Host to device, before a worker has measured it: PCIe 3 x16, or half of PCIe 4."""


@dataclass(frozen=True)
class Device:
    """A device as the scheduler sees it. `resident` is (component key, bytes), least recently used first.

    `budget_bytes` is what may be given out now; other programs took `others_bytes` of what there was to give out.
    `host_budget_bytes` is what the copies in host memory may take, where the host is not the device itself; `copies`
    are those that are there. `runs_s` is how long the job that it runs takes in all; `runs` what that needs, if another
    may follow it there, and `free_at` when it should have ended. `ahead` is the waiting job that it is prepared for;
    `brought` are the components that came ahead of their job, and that none has used yet.
    """

    id: str
    budget_bytes: int
    resident: tuple[tuple[str, int], ...] = ()
    idle: bool = True
    link_bytes_per_s: float = LINK_BYTES_PER_S
    host_budget_bytes: int | None = None
    runs_s: float = 0.0
    others_bytes: int = 0
    runs: Need | None = None
    free_at: float = 0.0
    ahead: str | None = None
    brought: frozenset[str] = frozenset()
    copies: tuple[tuple[str, int], ...] = ()

    @property
    def alone(self) -> "Device":
        """Once the other programs are gone."""
        return replace(self, budget_bytes=self.budget_bytes + self.others_bytes, others_bytes=0)

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - sum(weights_bytes for _, weights_bytes in self.resident)

    def missing_bytes(self, need: Need) -> int:
        """Weights that would have to be loaded before the job could run. A streamed component is there in part."""
        resident = dict(self.resident)
        return sum(max(0, weights_bytes - resident.get(key, 0)) for key, weights_bytes in need.components)

    def without_brought(self) -> "Device":
        """As if nothing had been prefetched, but for the room that it takes."""
        return replace(self, resident=tuple(entry for entry in self.resident if entry[0] not in self.brought))


@dataclass(frozen=True)
class Evict:
    device: str
    key: str


def able(need: Need, device: Device) -> bool:
    """Whether the device, with nothing else on it, could run the job in some way."""
    return choose(need, device) is not None


def choose(need: Need, device: Device) -> Way | None:
    """The way in which the job finishes soonest there; ways that change no pixel go before tiled decoding.

    None: it fits in none.
    """
    if need.devices is not None and device.id not in need.devices:
        return None
    if device.host_budget_bytes is not None and largest(need) > device.host_budget_bytes:
        return None
    fitting = [way for way in need.possible if need.bytes_in(way) <= device.budget_bytes]
    return min(fitting, key=lambda way: (way.tiled, seconds(need, device, way)), default=None)


def orders(need: Need, device: Device) -> Way:
    """The chosen way with all that the worker must know of it. The device must be able to run the job."""
    way = choose(need, device) or Way()
    phases = tuple((phase.name, phase.keys) for phase in need.phases)
    return replace(way, phases=phases, kept=need.kept(device.budget_bytes, way))


def seconds(need: Need, device: Device, way: Way) -> float:
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


def best(need: Need, idle: Iterable[Device]) -> Device:
    """Of the devices that can run the job, the one where it finishes soonest, then with the most room.

    Raises ValueError if none can: ask `able` first.
    """
    ways = [(device, way) for device in idle if (way := choose(need, device))]
    device, _ = min(ways, key=lambda pair: (pair[1].tiled, seconds(need, *pair), -pair[0].free_bytes))
    return device


def options(need: Need, idle: Iterable[Device]) -> list[tuple[float, Device]]:
    """The devices that could run the job now, best first, with the seconds that loading adds if nothing was prefetched.

    Prefetching is for the job that is to come, and no reason for another one to come in its place.
    """
    ways = [(device, way) for device in idle if (way := choose(need, device))]
    timed = [(way.tiled, seconds(need, device, way), -device.free_bytes, device, way) for device, way in ways]
    best_first = sorted(timed, key=lambda option: option[:3])
    return [
        (seconds(need, device.without_brought(), way) if device.brought else load_s, device)
        for _, load_s, _, device, way in best_first
    ]


def evictions(need: Need, device: Device) -> list[Evict]:
    """What makes room for the job: the least recently used first, nothing that it needs, no more than must be.

    A streamed job takes all there is: a block that stays is worth more than another job's weights.
    """
    way = choose(need, device) or Way()
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


def after(device: Device, need: Need, evicted: Iterable[str]) -> Device:
    """The device once `evicted` are gone and the job's components are loaded, busy."""
    gone = {*evicted} | need.keys
    kept = tuple(entry for entry in device.resident if entry[0] not in gone)
    return replace(device, resident=(*kept, *need.components), idle=False)


def refusal(need: Need, devices: Iterable[Device]) -> str | None:
    """Why no device here could ever hold this, or None if one could, were no other program on it."""
    devices = [device.alone for device in devices]
    if any(able(need, device) for device in devices):
        return None
    largest_bytes = max((device.budget_bytes for device in devices), default=0)
    if need.total_bytes > largest_bytes:
        return f"needs {need.total_bytes / GIB:.1f} GiB; the largest device here has {largest_bytes / GIB:.1f} GiB"
    host_bytes = max((device.host_budget_bytes or 0 for device in devices), default=0)
    return (
        f"has a component of {largest(need) / GIB:.1f} GiB; "
        f"host memory for the copies of weights is {host_bytes / GIB:.1f} GiB"
    )


def largest(need: Need) -> int:
    """Bytes of the largest component."""
    return max(need.sizes.values(), default=0)
