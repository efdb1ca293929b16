"""Devices and jobs under a virtual clock, driven by the real `plan()` or by another one. Pure."""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.scheduling.fairness import FairShareAccounting, Shares
from server.scheduling.need import Need
from server.scheduling.placement import after_start
from server.scheduling.types import Action, DeviceState, Evict, Prefetch, Refuse, Start, WaitingJob

Decide = Callable[[Sequence[WaitingJob], Sequence[DeviceState], float, Shares], Sequence[Action]]


@dataclass(frozen=True)
class Run:
    """One job's time on a device: loads until `runs_at`, then computes. `loaded_bytes` are those that it waited for."""

    job: WaitingJob
    device: str
    starts_at: float
    runs_at: float
    ends_at: float
    loaded_bytes: int

    @property
    def waited_s(self) -> float:
        return self.starts_at - self.job.created_at


@dataclass
class Simulation:
    """`busy_until` has the devices that run something. `took_s` has jobs that take not as long as expected.

    Weights without a copy in host memory come there at `disk_bytes_per_s` first. What is prefetched comes one after the
    other, once the running job has its own; `fetched` is (job, bytes that came to a device so).
    """

    decide: Decide
    devices: dict[str, DeviceState]
    now: float = 0.0
    busy_until: dict[str, float] = field(default_factory=dict)
    turns: FairShareAccounting = field(default_factory=FairShareAccounting)
    took_s: Mapping[str, float] = field(default_factory=dict)
    waiting: dict[str, WaitingJob] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    disk_bytes_per_s: float = math.inf
    fetched: list[tuple[str, int]] = field(default_factory=list)
    arrives: defaultdict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    loads_until: dict[str, float] = field(default_factory=dict)

    def live(self, arrivals: Iterable[WaitingJob], most: int | None = None) -> list[Run]:
        """Until everything that could run has, or `most` jobs have started."""
        coming = sorted(arrivals, key=lambda job: job.created_at)
        coming.reverse()
        ends = [(until, device, None) for device, until in self.busy_until.items()]
        heapq.heapify(ends)
        running: dict[str, WaitingJob] = {}
        while most is None or len(self.runs) < most:
            while coming and coming[-1].created_at <= self.now:
                self.comes(coming.pop())
            while ends and ends[0][0] <= self.now:
                self.frees(heapq.heappop(ends)[1], running)
            for run in self.decides():
                running[run.device] = run.job
                heapq.heappush(ends, (run.ends_at, run.device, None))
            moments = [*(each.created_at for each in coming[-1:]), *(each[0] for each in ends[:1])]
            if not moments:
                break
            self.now = max(self.now, min(moments))
        return self.runs

    def busy_until_then(self) -> float:
        """When the devices are free again, on average."""
        ends = {run.device: run.ends_at for run in self.runs} or self.busy_until
        return sum(ends.values()) / len(ends) if ends else self.now

    def comes(self, job: WaitingJob) -> None:
        self.waiting[job.job_id] = job
        self.turns.on_submitted(job)

    def frees(self, device: str, running: dict[str, WaitingJob]) -> None:
        self.devices[device] = replace(self.devices[device], idle=True, running_need=None)
        if job := running.pop(device, None):
            self.turns.on_finished(job, self.took_s.get(job.job_id, job.expected_s))

    def decides(self) -> list[Run]:
        """Once more after jobs have started: what their devices bring for the next ones is decided then."""
        made: list[Run] = []
        while True:
            before = len(made)
            for action in self.decide(
                list(self.waiting.values()), list(self.devices.values()), self.now, self.turns.shares
            ):
                match action:
                    case Evict(device, key):
                        self.evicts(device, key)
                    case Start(job_id, device):
                        made.append(self.starts(self.leaves(job_id), device))
                    case Prefetch():
                        self.fetches(action)
                    case Refuse(job_id):
                        self.leaves(job_id)
            if len(made) == before:
                self.runs += made
                return made

    def leaves(self, job_id: str) -> WaitingJob:
        """It waits no more, so that nothing is prepared for it any more."""
        for device in self.devices.values():
            if device.prefetching_for == job_id:
                self.devices[device.id] = replace(device, prefetching_for=None)
        return self.waiting.pop(job_id)

    def evicts(self, device: str, key: str) -> None:
        box = self.devices[device]
        left = tuple(each for each in box.resident if each[0] != key)
        self.devices[device] = replace(box, resident=left, prefetched=box.prefetched - {key})
        self.arrives[device].pop(key, None)

    def starts(self, job: WaitingJob, device: str) -> Run:
        self.turns.on_started(job, self.now)
        box, arrives = self.devices[device], self.arrives[device]
        loaded_bytes = box.missing_bytes(job.need)
        there_at = max([self.now, *(arrives.pop(key, 0.0) for key in job.need.keys)])
        missing = [key for key in job.need.keys if key not in dict(box.resident)]
        runs_at = there_at + self.disk_s(box, job.need, missing) + loaded_bytes / box.link_bytes_per_s
        ends_at = runs_at + self.took_s.get(job.job_id, job.expected_s)
        box = after_start(hosted(box, job.need, job.need.sizes), job.need, ())
        box = replace(box, running_need=job.need, running_expected_s=job.expected_s, free_at=ends_at)
        self.devices[device] = replace(box, prefetching_for=None, prefetched=box.prefetched - job.need.keys)
        self.loads_until[device] = runs_at
        return Run(job, device, self.now, runs_at, ends_at, loaded_bytes)

    def fetches(self, order: Prefetch) -> None:
        """The components are the device's own from now on, and of use once they have arrived."""
        box, need = self.devices[order.device], self.waiting[order.job_id].need
        at = max(self.now, self.loads_until.get(order.device, 0.0), *self.arrives[order.device].values(), 0.0)
        for key in (*order.to_device, *order.to_host):
            at += self.disk_s(box, need, [key])
            at += need.sizes[key] / box.link_bytes_per_s if key in order.to_device else 0.0
            self.arrives[order.device][key] = at
        coming = tuple((key, need.sizes[key]) for key in order.to_device)
        box = hosted(box, need, (*order.to_device, *order.to_host))
        box = replace(box, resident=(*coming, *box.resident), prefetching_for=order.job_id)
        self.devices[order.device] = replace(box, prefetched=box.prefetched | {*order.to_device})
        self.fetched.append((order.job_id, sum(size for _, size in coming)))

    def disk_s(self, box: DeviceState, need: Need, keys: Iterable[str]) -> float:
        copies = dict(box.host_copies)
        return sum(need.sizes[key] for key in keys if key not in copies) / self.disk_bytes_per_s


def hosted(box: DeviceState, need: Need, keys: Iterable[str]) -> DeviceState:
    """The device once the host has copies of these too: the least recently used that nothing needs make room."""
    keys = list(keys)
    if box.host_budget_bytes is None:
        return box
    in_use = {*keys, *dict(box.resident), *(box.running_need.keys if box.running_need else ())}
    copies = {key: size for key, size in box.host_copies if key not in keys} | {key: need.sizes[key] for key in keys}
    for key in [key for key in copies if key not in in_use]:
        if sum(copies.values()) > box.host_budget_bytes:
            del copies[key]
    return replace(box, host_copies=tuple(copies.items()))
