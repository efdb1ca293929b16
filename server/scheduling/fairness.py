"""Fair-share accounting: device-seconds by user, divided by the weight of their plan. Pure.

Fair queueing by virtual time, as in Linux's CFS: the user with the least virtual time goes first, and a user who
returns after a pause starts at the minimum virtual time, so that a pause neither earns nor costs anything.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from server.scheduling.types import WaitingJob


@dataclass(frozen=True)
class Shares:
    """`spent_s` are device-seconds over weight. `turn_at` is when a user's oldest job last started.

    `floor_s` is what the least served of those with work had spent: it only rises.
    """

    min_virtual_time_s: float = 0.0
    virtual_time_s: Mapping[str, float] = field(default_factory=dict)
    last_start_at: Mapping[str, float] = field(default_factory=dict)

    def spent(self, user_id: str) -> float:
        return self.virtual_time_s.get(user_id, self.min_virtual_time_s)


def activate(shares: Shares, user_id: str) -> Shares:
    """The user has work again, having had none."""
    level_s = max(shares.spent(user_id), shares.min_virtual_time_s)
    return replace(shares, virtual_time_s={**shares.virtual_time_s, user_id: level_s})


def charge(shares: Shares, user_id: str, device_s: float, weight: float, active: Iterable[str]) -> Shares:
    """The user has had so many device-seconds more, or fewer where a guess is put right. `active` are all with jobs."""
    virtual_time_s = {**shares.virtual_time_s, user_id: shares.spent(user_id) + device_s / weight}
    least_s = min(
        (virtual_time_s.get(each, shares.min_virtual_time_s) for each in active), default=shares.min_virtual_time_s
    )
    return replace(shares, virtual_time_s=virtual_time_s, min_virtual_time_s=max(shares.min_virtual_time_s, least_s))


def mark_started(shares: Shares, user_id: str, now: float) -> Shares:
    """The user's oldest job has started."""
    return replace(shares, last_start_at={**shares.last_start_at, user_id: now})


def jain_index(amounts: Iterable[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all."""
    values = list(amounts)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def max_min_shares(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """The fair division: nobody gets more than they ask for, and what some leave is divided among the others."""
    given, left_s = {}, capacity
    for index, (user_id, demand) in enumerate(sorted(demands.items(), key=lambda each: each[1])):
        given[user_id] = min(demand, left_s / (len(demands) - index))
        left_s -= given[user_id]
    return given


@dataclass(frozen=True)
class CompletedRun:
    """A job that a server before this one ran: instants of its submit, start and end."""

    job: WaitingJob
    started_at: float
    ended_at: float


class FairShareAccounting:
    """`shares` is what `plan()` reads."""

    def __init__(self, shares: Shares | None = None, running: Mapping[str, int] | None = None) -> None:
        self.shares = shares or Shares()
        self._waiting: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._running: Counter[str] = Counter(running)

    def copy_with(self, waiting: Iterable[WaitingJob]) -> "FairShareAccounting":
        """A copy in which only these jobs wait: for simulations."""
        copy = FairShareAccounting(self.shares, self._running)
        for job in waiting:
            copy._waiting[job.user_id][job.job_id] = None
        return copy

    def waiting(self, user_id: str) -> int:
        """How many of the user's jobs wait."""
        return len(self._waiting.get(user_id, ()))

    def on_submitted(self, job: WaitingJob) -> None:
        if job.user_id not in self._active():
            self.shares = activate(self.shares, job.user_id)
        self._waiting[job.user_id][job.job_id] = None

    def on_requeued(self, job: WaitingJob) -> None:
        """A job that ran waits again, before its user's others: what was charged for it is given back."""
        self._waiting[job.user_id] = {job.job_id: None, **self._waiting[job.user_id]}
        self._charge(job, -job.expected_s)
        self._stop(job)

    def on_started(self, job: WaitingJob, now: float) -> None:
        if next(iter(self._waiting[job.user_id]), None) == job.job_id:
            self.shares = mark_started(self.shares, job.user_id, now)
        self._running[job.user_id] += 1
        self._charge(job, job.expected_s)
        self.on_removed(job)

    def on_finished(self, job: WaitingJob, took_s: float) -> None:
        """The guess is put right by what it took."""
        self._charge(job, took_s - job.expected_s)
        self._stop(job)

    def on_removed(self, job: WaitingJob) -> None:
        """It waits no more."""
        self._waiting[job.user_id].pop(job.job_id, None)
        if not self._waiting[job.user_id]:
            del self._waiting[job.user_id]

    def _charge(self, job: WaitingJob, device_s: float) -> None:
        self.shares = charge(self.shares, job.user_id, device_s, job.weight, self._active())

    def _stop(self, job: WaitingJob) -> None:
        self._running[job.user_id] -= 1
        if self._running[job.user_id] <= 0:
            del self._running[job.user_id]

    def _active(self) -> set[str]:
        return self._waiting.keys() | self._running.keys()


def replay(runs: Iterable[CompletedRun]) -> FairShareAccounting:
    """The books after these jobs, which came, started and ended in this order; with nothing waiting or running."""
    turns = FairShareAccounting()
    events: list[tuple[float, int, CompletedRun]] = []
    for run in runs:
        events += [(run.job.created_at, 0, run), (run.started_at, 1, run), (run.ended_at, 2, run)]
    for at, what, run in sorted(events, key=lambda event: event[:2]):
        job = replace(run.job, expected_s=run.ended_at - run.started_at)
        if what == 0:
            turns.on_submitted(job)
        elif what == 1:
            turns.on_started(job, at)
        else:
            turns.on_finished(job, job.expected_s)
    return turns
