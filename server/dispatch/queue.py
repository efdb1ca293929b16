"""The jobs that wait: their order, whose turn it is, how long they take, and when each will start."""

import dataclasses
from collections.abc import Iterable, Sequence

from server.dispatch.messages import QueuedJob
from server.dispatch.worker_state import WorkerState
from server.jobs.job import Job
from server.model_registry import RunSpec
from server.scheduling import forecast, plan
from server.scheduling.estimates import DurationEstimate, DurationEstimates, work_units
from server.scheduling.fairness import CompletedRun, replay
from server.scheduling.forecast import QueuePosition
from server.scheduling.need import shape_of
from server.scheduling.plan import Policy
from server.scheduling.types import Action, DeviceState

WHOLE_QUEUE = "queue"
"""What `paused` calls the queue as a whole; devices go by their id."""
STARTING_S = 10.0
"""How long a worker takes to start, at a guess."""
RE_ESTIMATE_RATIO = 1.25
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 5, 600


class JobQueue:
    """Owned by the dispatcher. `jobs` are in the order in which they came."""

    def __init__(
        self, timings: Iterable[DurationEstimate], paused: Iterable[str], ran: Iterable[CompletedRun] = ()
    ) -> None:
        self.jobs: dict[str, QueuedJob] = {}
        self.turns = replay(ran)
        self.durations = DurationEstimates(list(timings))
        self.paused = set(paused)
        self.policy = Policy()
        self._positions: tuple[object, dict[str, QueuePosition]] = (None, {})
        self._unpredicted: list[str] = []
        self._predicted_start_at: dict[str, float | None] = {}
        self._settled: object = None
        self._changes = 0

    def queued(self, job: Job, runnable: RunSpec) -> QueuedJob:
        return QueuedJob(
            job_id=job.id,
            need=runnable.need,
            user_id=job.user_id,
            weight=job.weight,
            priority=job.priority,
            expected_s=self._expected_s(job, runnable.weights.model),
            created_at=job.created_at,
            group=group_key(job, runnable.weights.model),
            job=job,
            weights=runnable.weights,
            loras=runnable.loras,
        )

    def push(self, queued: QueuedJob) -> None:
        self._changes += 1
        self.jobs[queued.job_id] = queued
        self._unpredicted.append(queued.job_id)
        self.turns.on_submitted(queued)

    def push_front(self, queued: QueuedJob) -> None:
        """A job that ran, and is to run again before all others."""
        self._changes += 1
        self.jobs = {queued.job_id: queued, **self.jobs}
        self.turns.on_requeued(queued)

    def pop_for_start(self, job_id: str, now: float) -> QueuedJob:
        self._changes += 1
        queued = self.jobs.pop(job_id)
        self.turns.on_started(queued, now)
        return queued

    def remove(self, job_id: str) -> QueuedJob | None:
        """A job that is not to run: cancelled or refused. None if it does not wait."""
        self._changes += 1
        self._predicted_start_at.pop(job_id, None)
        if queued := self.jobs.pop(job_id, None):
            self.turns.on_removed(queued)
        return queued

    def replace(self, queued: QueuedJob) -> None:
        """The same job with another priority."""
        self._changes += 1
        self.jobs[queued.job_id] = queued

    def on_finished(self, queued: QueuedJob, took_s: float) -> None:
        self._changes += 1
        self.turns.on_finished(queued, took_s)

    def record_duration(self, queued: QueuedJob, run_s: float) -> DurationEstimate:
        """How long such jobs take; those that wait are told, if it is much else than was thought."""
        job = queued.job
        timing = self.durations.update(
            queued.weights.model, job.workflow, work_units(shape_of(job.params, job.pixels)), run_s
        )
        if not 1 / RE_ESTIMATE_RATIO < timing.run_s / max(queued.expected_s, 1e-9) < RE_ESTIMATE_RATIO:
            self.jobs = {job_id: self._expected_anew(each, queued) for job_id, each in self.jobs.items()}
        return timing

    def _expected_anew(self, waiting: QueuedJob, like: QueuedJob) -> QueuedJob:
        job = waiting.job
        if (waiting.weights.model, job.workflow) != (like.weights.model, like.job.workflow):
            return waiting
        return dataclasses.replace(waiting, expected_s=self._expected_s(job, waiting.weights.model))

    def _expected_s(self, job: Job, model: str) -> float:
        """`model` is what its weights are called: on demo weights it is another."""
        return self.durations.expected_s(model, job.workflow, work_units(shape_of(job.params, job.pixels)), job.kind)

    def plan(self, devices: Sequence[DeviceState], now: float) -> list[Action]:
        """Nothing starts while the queue is paused. What found nothing to do finds nothing until something changes."""
        state = (self._changes, tuple(devices))
        if WHOLE_QUEUE in self.paused or not self.jobs or state == self._settled:
            return []
        actions = plan.plan(list(self.jobs.values()), devices, now, self.turns.shares, self.policy)
        self._settled = None if actions else state
        return actions

    def set_paused(self, what: str, paused: bool) -> None:
        """`what` is WHOLE_QUEUE or a device."""
        self._changes += 1
        if paused:
            self.paused.add(what)
        else:
            self.paused.discard(what)

    def device_state(self, worker: WorkerState) -> DeviceState:
        """As the scheduler sees it: prepared for nothing any more once that job waits no longer."""
        view = worker.snapshot
        return view if view.prefetching_for in self.jobs else dataclasses.replace(view, prefetching_for=None)

    def device_states(self, workers: Iterable[WorkerState]) -> list[DeviceState]:
        return [self.device_state(worker) for worker in workers]

    def positions(self, workers: Sequence[WorkerState], now: float) -> dict[str, QueuePosition]:
        """Where each job stands and when it should start. Computed again at most once a second."""
        state = (self._changes, int(now))
        if self._positions[0] != state:
            free = {worker.id: at for worker in workers if (at := available_at(worker, now)) is not None}
            devices, waiting = self.device_states(workers), list(self.jobs.values())
            self._positions = (state, forecast.forecast(waiting, devices, free, now, self.turns, self.policy))
        return self._positions[1]

    def predict_starts(self, workers: Sequence[WorkerState], now: float) -> None:
        """Predict, once for each submitted job, when it starts. At its start the error of this is measured."""
        if self._unpredicted:
            positions = self.positions(workers, now)
            self._predicted_start_at |= {
                job_id: positions[job_id].start_at for job_id in self._unpredicted if job_id in positions
            }
            self._unpredicted.clear()

    def take_prediction(self, job_id: str) -> float | None:
        return self._predicted_start_at.pop(job_id, None)

    def wait_reason(self, queued: QueuedJob, workers: Sequence[WorkerState], now: float) -> str:
        """Why a job waits, for a person."""
        if WHOLE_QUEUE in self.paused:
            return "the queue is paused"
        place = self.positions(workers, now)[queued.job_id]
        views = [worker.snapshot for worker in workers if worker.status != "dead" and worker.id not in self.paused]
        titles = {worker.id: display_name(index, worker) for index, worker in enumerate(workers)}
        ahead_of = {worker.id: worker.prefetching_for for worker in workers}
        prepared = next((title for id_, title in titles.items() if ahead_of[id_] == queued.job_id), None)
        return forecast.reason(queued.need, place, views, titles, now, prepared)

    def retry_after_s(self, workers: Sequence[WorkerState]) -> int:
        """When to come again to a full queue: as soon as a tenth of what waits should have been done."""
        work_s = sum(queued.expected_s for queued in self.jobs.values())
        return round(min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, work_s / 10 / max(1, len(workers)))))

    def record_remote_duration(self, job: Job) -> DurationEstimate | None:
        """How long such jobs take at fal, its own queue included."""
        if job.started_at is None or job.finished_at is None:
            return None
        work = work_units(shape_of(job.params, job.pixels))
        return self.durations.update(job.model, job.workflow, work, max(0.0, job.finished_at - job.started_at))

    def remote_retry_after_s(self, jobs: Iterable[Job], now: float) -> int:
        """The same for jobs at fal, which run side by side: when a tenth of them should have ended."""
        left_s = sorted(self._expected_s(job, job.model) - (now - (job.started_at or now)) for job in jobs)
        wait_s = left_s[len(left_s) // 10] if left_s else 0.0
        return round(min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, wait_s)))


def available_at(worker: WorkerState, now: float) -> float | None:
    """When the worker could take another job; None if nobody knows, or an admin took it out."""
    match worker.status:
        case _ if worker.draining:
            return None
        case "loading" | "running":
            return max(now, worker.expected_end_at)
        case "idle":
            return now
        case _:
            return now + STARTING_S


def display_name(index: int, worker: WorkerState) -> str:
    """What a person calls the device."""
    return "the CPU" if worker.supervisor.device.torch_device == "cpu" else f"GPU {index}"


def group_key(job: Job, model: str) -> str:
    """Equal for jobs of one model, workflow and amount of work."""
    return f"{model} {job.workflow} {work_units(shape_of(job.params, job.pixels))}"
