from dataclasses import dataclass, field, replace

from server.dispatch.messages import QueuedJob
from server.scheduling import types
from server.scheduling.estimates import progress_timeout_s
from server.scheduling.external_memory import ExternalMemory, external_bytes
from server.scheduling.need import Need
from server.scheduling.types import LINK_BYTES_PER_S
from server.workers.supervisor import Supervisor


@dataclass
class PrefetchState:
    """Components that a device brings for a waiting job while it runs another: (key, name, bytes, "device" or "host").

    Once it has `ended`, `failure` says what went wrong, if anything did. `gone` are those that were evicted meanwhile.
    """

    job_id: str
    components: tuple[tuple[str, str, int, str], ...]
    ended: bool = False
    failure: str = ""
    gone: set[str] = field(default_factory=set)

    @property
    def coming(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes that the device has promised to them, and is not known to have yet."""
        ours = [(key, size) for key, _, size, to in self.components if to == "device" and key not in self.gone]
        return () if self.ended else tuple(ours)


@dataclass
class WorkerState:
    """What is known of one worker process."""

    supervisor: Supervisor
    budget_bytes: int
    resident: tuple[tuple[str, int], ...] = ()
    status: str = "starting"  # starting idle loading running dead
    runs: QueuedJob | None = None
    ends_at: float = 0.0  # when the running job should have ended
    load_s: float = 0.0  # of that, what its weights take to load
    started_at: float = 0.0
    sign_at: float = 0.0  # of the last sign of progress
    hang_s: float = 0.0  # so long without one, and the job hangs
    hung: bool = False
    cancelling: bool = False  # somebody asked for the end of what it runs
    halted: bool = False  # an admin took the device out: it ends what it runs and starts nothing
    deaths: int = 0  # in a row, with no job done between
    others: ExternalMemory = field(default_factory=ExternalMemory)
    settled: bool = False  # idle, and it has said what it has: then the driver's figure tells of the others
    link_bytes_per_s: float = LINK_BYTES_PER_S
    copies: tuple[tuple[str, int], ...] = ()  # of weights, in host memory
    preparations: tuple[PrefetchState, ...] = ()  # the newest last; older ones while they have not ended
    ahead: str | None = None  # the job that this one's run has prepared for
    fact: tuple[tuple[str, int], ...] = ()  # what it last said is resident
    brought: frozenset[str] = frozenset()  # components that came ahead, and that no job has used yet

    @property
    def preparation(self) -> PrefetchState | None:
        """The newest one."""
        return self.preparations[-1] if self.preparations else None

    @property
    def id(self) -> str:
        return self.supervisor.device.id

    @property
    def view(self) -> types.DeviceState:
        return types.DeviceState(
            self.id,
            max(0, self.budget_bytes - self.others.taken_bytes),
            self.resident,
            idle=self.status == "idle" and not self.halted,
            link_bytes_per_s=self.link_bytes_per_s,
            host_budget_bytes=self.supervisor.device.host_budget_bytes,
            runs_s=self.runs.expected_s if self.runs else 0.0,
            others_bytes=min(self.budget_bytes, self.others.taken_bytes),
            runs=self.runs.need if self.runs and not self.halted else None,
            free_at=self.ends_at,
            ahead=self.ahead,
            brought=self.brought,
            copies=self.copies,
        )

    def hear_driver(self, free_bytes: int, now: float) -> None:
        """What the driver calls free. While a job runs, nobody can tell what of the rest is its own."""
        if self.settled and self.status == "idle":
            resident_bytes = sum(weights_bytes for _, weights_bytes in self.resident)
            margin_bytes = self.supervisor.device.margin_bytes
            self.others = self.others.seen(
                external_bytes(self.budget_bytes, resident_bytes, free_bytes, margin_bytes), now
            )

    def told(self, components: tuple[tuple[str, int], ...], copies: tuple[tuple[str, int], ...]) -> None:
        """What is there now, and what was ordered since: what the running job needs, and what is being brought."""
        ordered = dict(self.runs.need.components if self.runs else ())
        for preparation in self.preparations:
            ordered |= preparation.coming
        known, self.fact = dict(components), components
        self.resident = (*components, *((key, size) for key, size in ordered.items() if key not in known))
        self.copies = copies

    def prepares(self, preparation: PrefetchState) -> None:
        """In place of what an older one has not begun to bring. Its bytes are the device's from now on."""
        self.forget({key for key, _ in preparation.coming})
        self.resident = (*preparation.coming, *self.resident)  # never used: the first to go
        self.preparations = (*(each for each in self.preparations if not each.ended), preparation)
        self.ahead, self.brought = preparation.job_id, self.brought | dict(preparation.coming).keys()

    def prepared(self, job_id: str, failure: str) -> None:
        """The preparation for this job has ended. What did not come of it is not the device's any more."""
        for preparation in [each for each in self.preparations if each.job_id == job_id and not each.ended][:1]:
            preparation.ended, preparation.failure = True, failure
        self.told(self.fact, self.copies)

    def late(self, need: Need) -> tuple[str, ...]:
        """Of the components that are being brought for another job: those that this need has, too."""
        return tuple(key for each in self.preparations for key, _ in each.coming if key in need.keys)

    def missing_bytes(self, need: Need) -> int:
        """Of a job that starts here now: what is still being brought is missing, too."""
        coming = {key for each in self.preparations for key, _ in each.coming}
        there = tuple(entry for entry in self.resident if entry[0] not in coming)
        return replace(self.view, resident=there).missing_bytes(need)

    def lose_all(self) -> None:
        """Nothing is on the device any more, or comes there."""
        self.resident, self.fact, self.preparations, self.ahead, self.brought = (), (), (), None, frozenset()

    def forget(self, keys: set[str] | frozenset[str]) -> None:
        """These components are not resident any more."""
        self.resident = tuple(entry for entry in self.resident if entry[0] not in keys)
        self.brought -= keys
        for preparation in self.preparations:
            preparation.gone |= keys


def expect(worker: WorkerState, queued: QueuedJob, now: float) -> None:
    """When the job that starts here should have ended, and when it hangs."""
    missing_bytes = worker.missing_bytes(queued.need)
    worker.load_s = missing_bytes / worker.link_bytes_per_s
    worker.started_at = worker.sign_at = now
    worker.ends_at = now + worker.load_s + queued.expected_s
    worker.hang_s = progress_timeout_s(queued.expected_s, missing_bytes)
