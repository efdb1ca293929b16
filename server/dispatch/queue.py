"""The jobs that wait: their order, whose turn it is, how long they take, and when each will start."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from server.dispatch.messages import QueuedJob
from server.dispatch.worker_state import WorkerState
from server.jobs.job import Job, NewJob
from server.model_registry import RunSpec
from server.scheduling import forecast, plan
from server.scheduling.estimates import DurationEstimate, DurationEstimates, work_units
from server.scheduling.fairness import CompletedRun, replay
from server.scheduling.forecast import QueuePosition
from server.scheduling.need import shape_of
from server.scheduling.plan import Policy
from server.scheduling.types import Action, DeviceState, WaitingJob

WHOLE_QUEUE = "queue"
"""What `halted` calls the queue as a whole; devices go by their id."""
STARTING_S = 10.0
"""How long a worker takes to start, at a guess."""
RE_ESTIMATE_RATIO = 1.25
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 5, 600


class JobQueue:
    """Owned by the dispatcher. `jobs` are in the order in which they came."""

    def __init__(
        self, timings: Iterable[DurationEstimate], halted: Iterable[str], ran: Iterable[CompletedRun] = ()
    ) -> None:
        self.jobs: dict[str, QueuedJob] = {}
        self.turns = replay(ran)
        self.timings = DurationEstimates(list(timings))
        self.halted = set(halted)
        self.policy = Policy()
        self._seen: tuple[object, dict[str, QueuePosition]] = (None, {})
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

    def add(self, queued: QueuedJob) -> None:
        self._changes += 1
        self.jobs[queued.job_id] = queued
        self.turns.came(queued)

    def add_back(self, queued: QueuedJob) -> None:
        """A job that ran, and is to run again before all others."""
        self._changes += 1
        self.jobs = {queued.job_id: queued, **self.jobs}
        self.turns.came_back(queued)

    def start(self, job_id: str, now: float) -> QueuedJob:
        self._changes += 1
        queued = self.jobs.pop(job_id)
        self.turns.started(queued, now)
        return queued

    def drop(self, job_id: str) -> QueuedJob | None:
        """A job that is not to run: cancelled or refused. None if it does not wait."""
        self._changes += 1
        if queued := self.jobs.pop(job_id, None):
            self.turns.left(queued)
        return queued

    def put(self, queued: QueuedJob) -> None:
        """The same job with another priority."""
        self._changes += 1
        self.jobs[queued.job_id] = queued

    def ended(self, queued: QueuedJob, took_s: float) -> None:
        self._changes += 1
        self.turns.ended(queued, took_s)

    def learn(self, queued: QueuedJob, run_s: float) -> DurationEstimate:
        """How long such jobs take; those that wait are told, if it is much else than was thought."""
        job = queued.job
        timing = self.timings.learn(
            queued.weights.model, job.workflow, work_units(shape_of(job.params, job.pixels)), run_s
        )
        if not 1 / RE_ESTIMATE_RATIO < timing.run_s / max(queued.expected_s, 1e-9) < RE_ESTIMATE_RATIO:
            self.jobs = {job_id: self._expected_anew(each, queued) for job_id, each in self.jobs.items()}
        return timing

    def _expected_anew(self, waiting: QueuedJob, like: QueuedJob) -> QueuedJob:
        job = waiting.job
        if (waiting.weights.model, job.workflow) != (like.weights.model, like.job.workflow):
            return waiting
        return replace(waiting, expected_s=self._expected_s(job, waiting.weights.model))

    def _expected_s(self, job: Job | NewJob, model: str) -> float:
        """`model` is what its weights are called: on demo weights it is another."""
        return self.timings.expect(model, job.workflow, work_units(shape_of(job.params, job.pixels)), job.kind)

    def plan(self, devices: Sequence[DeviceState], now: float) -> list[Action]:
        """Nothing starts while the queue is halted. What found nothing to do finds nothing until something changes."""
        state = (self._changes, tuple(devices))
        if WHOLE_QUEUE in self.halted or not self.jobs or state == self._settled:
            return []
        actions = plan.plan(list(self.jobs.values()), devices, now, self.turns.shares, self.policy)
        self._settled = None if actions else state
        return actions

    def view(self, worker: WorkerState) -> DeviceState:
        """As the scheduler sees it: prepared for nothing any more once that job waits no longer."""
        view = worker.view
        return view if view.ahead in self.jobs else replace(view, ahead=None)

    def views(self, workers: Iterable[WorkerState]) -> list[DeviceState]:
        return [self.view(worker) for worker in workers]

    def places(
        self, workers: Sequence[WorkerState], now: float, also: WaitingJob | None = None
    ) -> dict[str, QueuePosition]:
        """Where each job stands; `also` is one that would come now. Looked up again at most once a second."""
        state = (self._changes, int(now), also)
        if self._seen[0] != state:
            waiting = [*self.jobs.values(), *([also] if also else [])]
            turns = self.turns if also is None else self.turns.with_one_more(also)
            free = {worker.id: at for worker in workers if (at := available_at(worker, now)) is not None}
            self._seen = (state, forecast.forecast(waiting, self.views(workers), free, now, turns, self.policy))
        return self._seen[1]

    def promise(self, new: NewJob, runnable: RunSpec, workers: Sequence[WorkerState], now: float) -> float | None:
        """When a job that comes now should start; it is measured how far this was off."""
        expected_s, group = self._expected_s(new, runnable.weights.model), group_key(new, runnable.weights.model)
        job = WaitingJob(
            new.id, runnable.need, new.user_id, new.weight, expected_s=expected_s, created_at=now, group=group
        )
        return self.places(workers, now, job)[new.id].start_at

    def reason(self, queued: QueuedJob, workers: Sequence[WorkerState], now: float) -> str:
        """Why a job waits, for a person."""
        if WHOLE_QUEUE in self.halted:
            return "the queue is paused"
        place = self.places(workers, now)[queued.job_id]
        views = [worker.view for worker in workers if worker.status != "dead" and worker.id not in self.halted]
        titles = {worker.id: display_name(index, worker) for index, worker in enumerate(workers)}
        ahead_of = {worker.id: worker.ahead for worker in workers}
        prepared = next((title for id_, title in titles.items() if ahead_of[id_] == queued.job_id), None)
        return forecast.reason(queued.need, place, views, titles, now, prepared)

    def retry_s(self, workers: Sequence[WorkerState]) -> int:
        """When to come again to a full queue: as soon as a tenth of what waits should have been done."""
        work_s = sum(queued.expected_s for queued in self.jobs.values())
        return round(min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, work_s / 10 / max(1, len(workers)))))

    def learn_remote(self, job: Job) -> DurationEstimate | None:
        """How long such jobs take at fal, its own queue included."""
        if job.started_at is None or job.finished_at is None:
            return None
        work = work_units(shape_of(job.params, job.pixels))
        return self.timings.learn(job.model, job.workflow, work, max(0.0, job.finished_at - job.started_at))

    def retry_remote_s(self, jobs: Iterable[Job], now: float) -> int:
        """The same for jobs at fal, which run side by side: when a tenth of them should have ended."""
        left_s = sorted(self._expected_s(job, job.model) - (now - (job.started_at or now)) for job in jobs)
        wait_s = left_s[len(left_s) // 10] if left_s else 0.0
        return round(min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, wait_s)))


def available_at(worker: WorkerState, now: float) -> float | None:
    """When the worker could take another job; None if nobody knows, or an admin took it out."""
    match worker.status:
        case _ if worker.halted:
            return None
        case "loading" | "running":
            return max(now, worker.ends_at)
        case "idle":
            return now
        case _:
            return now + STARTING_S


def display_name(index: int, worker: WorkerState) -> str:
    """What a person calls the device."""
    return "the CPU" if worker.supervisor.device.torch_device == "cpu" else f"GPU {index}"


def group_key(job: Job | NewJob, model: str) -> str:
    """Equal for jobs of one model, workflow and amount of work."""
    return f"{model} {job.workflow} {work_units(shape_of(job.params, job.pixels))}"
