"""The books of fairness, kept up as jobs come, start and end. Pure: told the time, never asking for it."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from server import fairness
from server.fairness import Shares
from server.waiting import Waiting


@dataclass(frozen=True)
class Ran:
    """A job that a server before this one ran: instants of its submit, start and end."""

    job: Waiting
    started_at: float
    ended_at: float


class Turns:
    """`shares` is what `plan()` reads."""

    def __init__(self) -> None:
        self.shares = Shares()
        self._waiting: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._running: Counter[str] = Counter()

    def copied(self, waiting: Iterable[Waiting]) -> "Turns":
        """As the books stand now, with only these waiting: for looking ahead."""
        turns = Turns()
        turns.shares, turns._running = self.shares, Counter(self._running)
        for job in waiting:
            turns._waiting[job.user_id][job.job_id] = None
        return turns

    def with_one_more(self, job: Waiting) -> "Turns":
        """The books if this job came now."""
        turns = Turns()
        turns.shares, turns._running = self.shares, Counter(self._running)
        if job.user_id not in self._active():
            turns.shares = fairness.joined(self.shares, job.user_id)
        return turns

    def waiting(self, user_id: str) -> int:
        """How many of the user's jobs wait."""
        return len(self._waiting.get(user_id, ()))

    def came(self, job: Waiting) -> None:
        if job.user_id not in self._active():
            self.shares = fairness.joined(self.shares, job.user_id)
        self._waiting[job.user_id][job.job_id] = None

    def came_back(self, job: Waiting) -> None:
        """A job that ran waits again, before its user's others: what was charged for it is given back."""
        self._waiting[job.user_id] = {job.job_id: None, **self._waiting[job.user_id]}
        self._charge(job, -job.expected_s)
        self._stop(job)

    def started(self, job: Waiting, now: float) -> None:
        if next(iter(self._waiting[job.user_id]), None) == job.job_id:
            self.shares = fairness.turned(self.shares, job.user_id, now)
        self._running[job.user_id] += 1
        self._charge(job, job.expected_s)
        self.left(job)

    def ended(self, job: Waiting, took_s: float) -> None:
        """The guess is put right by what it took."""
        self._charge(job, took_s - job.expected_s)
        self._stop(job)

    def left(self, job: Waiting) -> None:
        """It waits no more."""
        self._waiting[job.user_id].pop(job.job_id, None)
        if not self._waiting[job.user_id]:
            del self._waiting[job.user_id]

    def _charge(self, job: Waiting, device_s: float) -> None:
        self.shares = fairness.charged(self.shares, job.user_id, device_s, job.weight, self._active())

    def _stop(self, job: Waiting) -> None:
        self._running[job.user_id] -= 1
        if self._running[job.user_id] <= 0:
            del self._running[job.user_id]

    def _active(self) -> set[str]:
        return self._waiting.keys() | self._running.keys()


def replayed(runs: Iterable[Ran]) -> Turns:
    """The books after these jobs, which came, started and ended in this order; with nothing waiting or running."""
    turns = Turns()
    events: list[tuple[float, int, Ran]] = []
    for run in runs:
        events += [(run.job.created_at, 0, run), (run.started_at, 1, run), (run.ended_at, 2, run)]
    for at, what, run in sorted(events, key=lambda event: event[:2]):
        job = replace(run.job, expected_s=run.ended_at - run.started_at)
        if what == 0:
            turns.came(job)
        elif what == 1:
            turns.started(job, at)
        else:
            turns.ended(job, job.expected_s)
    return turns
