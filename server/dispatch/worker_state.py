"""What the dispatcher knows of one worker process, and every transition of that knowledge."""

from dataclasses import dataclass, field, replace
from typing import Literal

from server.dispatch.messages import QueuedJob
from server.scheduling.estimates import progress_timeout_s
from server.scheduling.external_memory import ExternalMemory, external_bytes
from server.scheduling.need import Need
from server.scheduling.types import LINK_BYTES_PER_S, DeviceState
from server.workers.supervisor import Supervisor

Status = Literal["starting", "idle", "loading", "running", "dead"]

START_TIMEOUT_S = 300.0
"""A worker that has not reported `Ready` by then is killed. On a slow disk torch alone takes a minute to import."""


@dataclass
class PrefetchState:
    """A prefetch for a waiting job while the device runs another: (key, name, bytes, "device" or "host").

    `evicted` are the components that were evicted since; `error` says what failed, once it is `done`.
    """

    job_id: str
    components: tuple[tuple[str, str, int, str], ...]
    done: bool = False
    error: str = ""
    evicted: set[str] = field(default_factory=set)

    @property
    def pending(self) -> tuple[tuple[str, int], ...]:
        """Keys and bytes that are reserved on the device for components not known to have arrived."""
        ours = [(key, size) for key, _, size, to in self.components if to == "device" and key not in self.evicted]
        return () if self.done else tuple(ours)


@dataclass
class WorkerState:
    """One worker process. Its fields change only by its own methods, one for each transition.

    Instants (`*_at`) are of the dispatcher's clock; `resident` and `host_copies` are (component key, bytes).
    """

    supervisor: Supervisor
    budget_bytes: int
    draining: bool = False
    """Taken out by an admin: it finishes its job and starts nothing."""
    status: Status = "starting"
    resident: tuple[tuple[str, int], ...] = ()
    """Components on the device, or reserved for it, oldest use first."""
    reported_resident: tuple[tuple[str, int], ...] = ()
    host_copies: tuple[tuple[str, int], ...] = ()
    job: QueuedJob | None = None
    started_at: float = 0.0
    expected_end_at: float = 0.0
    load_s: float = 0.0
    """How long the job's missing weights take to load: not counted as the job's own duration."""
    last_progress_at: float = 0.0
    progress_timeout_s: float = 0.0
    timed_out: bool = False
    cancel_requested: bool = False
    consecutive_crashes: int = 0
    external: ExternalMemory = field(default_factory=ExternalMemory)
    idle_confirmed: bool = False
    """Idle, and it has reported what is resident: only then the driver's free-memory figure shows other processes."""
    link_bytes_per_s: float = LINK_BYTES_PER_S
    prefetches: tuple[PrefetchState, ...] = ()
    """The newest last; older ones while they are not done."""
    prefetching_for: str | None = None
    prefetched: frozenset[str] = frozenset()
    """Components that were prefetched and that no job has used yet."""

    # Reading

    @property
    def id(self) -> str:
        return self.supervisor.device.id

    @property
    def prefetch(self) -> PrefetchState | None:
        """The newest one."""
        return self.prefetches[-1] if self.prefetches else None

    @property
    def snapshot(self) -> DeviceState:
        """The device as the scheduler sees it."""
        return DeviceState(
            self.id,
            max(0, self.budget_bytes - self.external.taken_bytes),
            self.resident,
            idle=self.status == "idle" and not self.draining,
            link_bytes_per_s=self.link_bytes_per_s,
            host_budget_bytes=self.supervisor.device.host_budget_bytes,
            running_expected_s=self.job.expected_s if self.job else 0.0,
            external_bytes=min(self.budget_bytes, self.external.taken_bytes),
            running_need=self.job.need if self.job and not self.draining else None,
            free_at=self.expected_end_at,
            prefetching_for=self.prefetching_for,
            prefetched=self.prefetched,
            host_copies=self.host_copies,
        )

    @property
    def restart_delay_s(self) -> float:
        """Exponential back-off: 0, 1, 3, 7 … seconds after the first, second … crash in a row."""
        return 2.0 ** (self.consecutive_crashes - 1) - 1

    def missing_bytes(self, need: Need) -> int:
        """What has to be loaded for a job that starts now; components that are still arriving are missing, too."""
        pending = {key for each in self.prefetches for key, _ in each.pending}
        there = tuple(entry for entry in self.resident if entry[0] not in pending)
        return replace(self.snapshot, resident=there).missing_bytes(need)

    def still_arriving(self, need: Need) -> tuple[str, ...]:
        """Keys of `need` that are being prefetched for another job."""
        return tuple(key for each in self.prefetches for key, _ in each.pending if key in need.keys)

    # The process

    def starting(self, now: float) -> None:
        self.status, self.last_progress_at = "starting", now

    def ready(self, link_bytes_per_s: float | None) -> None:
        self.status, self.idle_confirmed = "idle", True
        self.link_bytes_per_s = link_bytes_per_s or self.link_bytes_per_s

    def exited(self) -> None:
        self.status, self.host_copies = "dead", ()
        self.consecutive_crashes += 1
        self.reset_device()

    def drain(self, draining: bool) -> None:
        self.draining = draining

    # Its job

    def start(self, queued: QueuedJob, now: float) -> None:
        """`loading` a job: what it needs counts as resident from now on, used last."""
        missing_bytes = self.missing_bytes(queued.need)
        self.load_s = missing_bytes / self.link_bytes_per_s
        self.started_at = self.last_progress_at = now
        self.expected_end_at = now + self.load_s + queued.expected_s
        self.progress_timeout_s = progress_timeout_s(queued.expected_s, missing_bytes)
        self.status, self.job, self.cancel_requested, self.idle_confirmed = "loading", queued, False, False
        self.prefetching_for = None
        self.remove(queued.need.keys)
        self.resident += queued.need.components

    def progress(self, now: float) -> None:
        self.status, self.last_progress_at = "running", now

    def request_cancel(self) -> None:
        self.cancel_requested = True

    def stalled(self, now: float) -> Literal["start", "job"] | None:
        """What has shown no progress for too long; each start and each job is reported once."""
        self.last_progress_at = min(self.last_progress_at, now)  # the clock may have been set back
        silent_s = now - self.last_progress_at
        if self.status == "starting" and silent_s > START_TIMEOUT_S:
            self.last_progress_at = now
            return "start"
        if self.job and not self.timed_out and silent_s > self.progress_timeout_s:
            self.timed_out = True
            return "job"
        return None

    def give_up_job(self) -> tuple[QueuedJob | None, bool]:
        """Detach the job, which is to run again elsewhere; returns it, and whether it had stalled."""
        queued, timed_out = self.job, self.timed_out
        self.job, self.timed_out = None, False
        return queued, timed_out

    def out_of_memory(self) -> None:
        """The worker has freed the device after an out-of-memory error."""
        self.reset_device()

    def idle(self) -> None:
        self.status = "idle"

    def finish(self) -> None:
        """The job has ended, however it did."""
        self.status, self.job, self.consecutive_crashes = "idle", None, 0

    # Memory

    def report_resident(self, components: tuple[tuple[str, int], ...], copies: tuple[tuple[str, int], ...]) -> None:
        """What the worker reports as resident and as host copies."""
        self._set_resident(components, copies)
        self.idle_confirmed = self.status == "idle" and not any(each.pending for each in self.prefetches)

    def observe_free_memory(self, free_bytes: int, now: float) -> None:
        """The driver's figure. While a job runs, its own working memory cannot be told from other processes'."""
        if self.idle_confirmed and self.status == "idle":
            resident_bytes = sum(weights_bytes for _, weights_bytes in self.resident)
            margin_bytes = self.supervisor.device.margin_bytes
            taken_bytes = external_bytes(self.budget_bytes, resident_bytes, free_bytes, margin_bytes)
            self.external = self.external.seen(taken_bytes, now)

    def begin_prefetch(self, prefetch: PrefetchState) -> None:
        """Replaces what an older prefetch has not begun to load. Its bytes are reserved from now on."""
        self.remove({key for key, _ in prefetch.pending})
        self.resident = (*prefetch.pending, *self.resident)  # never used: the first to be evicted
        self.prefetches = (*(each for each in self.prefetches if not each.done), prefetch)
        self.prefetching_for, self.prefetched = prefetch.job_id, self.prefetched | dict(prefetch.pending).keys()

    def end_prefetch(self, job_id: str, error: str) -> None:
        """What the prefetch for this job did not load is not reserved any more."""
        for prefetch in [each for each in self.prefetches if each.job_id == job_id and not each.done][:1]:
            prefetch.done, prefetch.error = True, error
        self._set_resident(self.reported_resident, self.host_copies)

    def remove(self, keys: set[str] | frozenset[str]) -> None:
        """These components are not resident any more."""
        self.resident = tuple(entry for entry in self.resident if entry[0] not in keys)
        self.prefetched -= keys
        for prefetch in self.prefetches:
            prefetch.evicted |= keys

    def reset_device(self) -> None:
        """Nothing is resident or arriving any more."""
        self.resident, self.reported_resident, self.prefetches = (), (), ()
        self.prefetching_for, self.prefetched = None, frozenset()

    def _set_resident(self, components: tuple[tuple[str, int], ...], copies: tuple[tuple[str, int], ...]) -> None:
        """The reported components, and what was ordered since: the running job's, and what is being prefetched."""
        ordered = dict(self.job.need.components if self.job else ())
        for prefetch in self.prefetches:
            ordered |= prefetch.pending
        known, self.reported_resident = dict(components), components
        self.resident = (*components, *((key, size) for key, size in ordered.items() if key not in known))
        self.host_copies = copies
