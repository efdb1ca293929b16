"""What a server before this one left: its queue, who has had how much, and what ran out of memory."""

from collections.abc import Callable

from server.dispatch.memory import MemoryTracker
from server.dispatch.queue import JobQueue
from server.dispatch.records import FailedMode, read_failed_modes, read_timings
from server.errors import PlantainError
from server.jobs.job import FinishedRun, Job, error_of
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry
from server.scheduling.fairness import CompletedRun
from server.scheduling.need import Need, shape_of
from server.scheduling.types import WaitingJob


def completed_run(run: FinishedRun) -> CompletedRun:
    job = WaitingJob(run.job_id, Need((), 0), run.user_id, run.weight, created_at=run.created_at)
    return CompletedRun(job, run.started_at, run.finished_at)


REMEMBERED_S = 7 * 86_400.0
"""How long it counts, over restarts, that jobs ran out of memory: what else was on the device may be gone."""
SHARES_S = 86_400.0
"""Who has had how much in this time counts after a restart, too."""


def restore_queue(store: JobStore, now: float) -> JobQueue:
    """Its books, with nothing waiting yet."""
    return JobQueue(
        read_timings(store.database.db),
        store.paused(),
        [completed_run(run) for run in store.completed_runs(now - SHARES_S)],
    )


async def restore_oom_history(
    store: JobStore, shelf: ModelRegistry, memory: MemoryTracker, clock: Callable[[], float]
) -> None:
    """What ran out of memory, for the needs of the jobs that are taken up next."""
    for forced in await store.database.run(read_failed_modes, clock() - REMEMBERED_S):
        _recall(shelf, memory, await store.database.call(store.job, forced.job_id), forced)


async def requeue_unfinished(
    store: JobStore, shelf: ModelRegistry, backlog: JobQueue, clock: Callable[[], float]
) -> None:
    """Queue the jobs that have not ended; those whose model is gone fail."""
    for job in await store.database.call(store.requeue_interrupted, clock()):
        try:
            runnable = shelf.runnable(job.model, job.pixels, job.params, job.weights)
        except PlantainError as gone:
            await store.database.call(store.fail, job.id, error_of(gone), clock())
        else:
            backlog.add(backlog.queued(job, runnable))


def _recall(shelf: ModelRegistry, memory: MemoryTracker, job: Job, forced: FailedMode) -> None:
    try:
        runnable = shelf.runnable(job.model, job.pixels, job.params, job.weights)
    except PlantainError:
        return  # the model is not here any more
    shape = shape_of(job.params, job.pixels)
    memory.recall(runnable.weights.model, runnable.need, forced.way, shape, forced.budget_bytes)
