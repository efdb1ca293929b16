"""Devices and jobs under a virtual clock, driven by the real `plan()` or by another one. Pure."""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.fairness import Shares
from server.placement import Device, after
from server.scheduler import Action, Evict, Start, Waiting
from server.turns import Turns

Decide = Callable[[Sequence[Waiting], Sequence[Device], float, Shares], Sequence[Action]]


@dataclass(frozen=True)
class Run:
    """One job's time on a device: loads until `runs_at`, then computes."""

    job: Waiting
    device: str
    starts_at: float
    runs_at: float
    ends_at: float
    loaded_bytes: int

    @property
    def waited_s(self) -> float:
        return self.starts_at - self.job.created_at


@dataclass
class World:
    """`busy_until` has the devices that run something. `took_s` has jobs that take not as long as expected."""

    decide: Decide
    devices: dict[str, Device]
    now: float = 0.0
    busy_until: dict[str, float] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)
    took_s: Mapping[str, float] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def live(self, arrivals: Iterable[Waiting], most: int | None = None) -> list[Run]:
        """Until everything that could run has, or `most` jobs have started."""
        coming = sorted(arrivals, key=lambda job: job.created_at)
        coming.reverse()
        ends = [(until, device, None) for device, until in self.busy_until.items()]
        heapq.heapify(ends)
        running: dict[str, Waiting] = {}
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

    def comes(self, job: Waiting) -> None:
        self.waiting[job.job_id] = job
        self.turns.came(job)

    def frees(self, device: str, running: dict[str, Waiting]) -> None:
        self.devices[device] = replace(self.devices[device], idle=True)
        if job := running.pop(device, None):
            self.turns.ended(job, self.took_s.get(job.job_id, job.expected_s))

    def decides(self) -> list[Run]:
        actions = self.decide(list(self.waiting.values()), list(self.devices.values()), self.now, self.turns.shares)
        evicted: dict[str, set[str]] = {}
        made = []
        for action in actions:
            match action:
                case Evict(device, key):
                    evicted.setdefault(device, set()).add(key)
                case Start(job_id, device):
                    made.append(self.starts(self.waiting.pop(job_id), device, evicted.get(device, set())))
                case _:
                    self.waiting.pop(action.job_id)
        self.runs += made
        return made

    def starts(self, job: Waiting, device: str, evicted: set[str]) -> Run:
        self.turns.started(job, self.now)
        box = self.devices[device]
        kept = replace(box, resident=tuple(each for each in box.resident if each[0] not in evicted))
        loaded_bytes = kept.missing_bytes(job.need)
        self.devices[device] = replace(after(box, job.need, evicted), runs_s=job.expected_s)
        runs_at = self.now + loaded_bytes / box.link_bytes_per_s
        ends_at = runs_at + self.took_s.get(job.job_id, job.expected_s)
        return Run(job, device, self.now, runs_at, ends_at, loaded_bytes)
