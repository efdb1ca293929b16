"""State restored at start: the queue, fair-share accounting and out-of-memory history."""

from collections.abc import Callable, Sequence

from server.dispatch.memory import MemoryTracker
from server.dispatch.queue import JobQueue
from server.dispatch.records import FailedMode, read_failed_modes, read_peaks, read_timings
from server.errors import PlantainError
from server.jobs.job import FinishedRun, Job, error_of
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry
from server.scheduling.estimates import PeakEstimates
from server.scheduling.fairness import CompletedRun
from server.scheduling.need import Need, shape_of
from server.scheduling.types import WaitingJob
from server.workers.devices import DeviceSpec


def completed_run(run: FinishedRun) -> CompletedRun:
    job = WaitingJob(run.job_id, Need((), 0), run.user_id, run.weight, created_at=run.created_at)
    return CompletedRun(job, run.started_at, run.finished_at)


REMEMBERED_S = 7 * 86_400.0
"""How long it counts, over restarts, that jobs ran out of memory: what else was on the device may be gone."""
SHARES_S = 86_400.0
"""Device time used in this period counts towards fair shares after a restart."""


def restore_peaks(jobs: JobStore, devices: Sequence[DeviceSpec]) -> PeakEstimates:
    kinds = {"cuda" if device.torch_device.startswith("cuda") else "cpu" for device in devices}
    return PeakEstimates(min(kinds, default="cpu"), read_peaks(jobs.database.db))


def restore_queue(store: JobStore, now: float) -> JobQueue:
    """With durations, pauses and fair shares, and nothing waiting yet."""
    return JobQueue(
        read_timings(store.database.db),
        store.paused(),
        [completed_run(run) for run in store.completed_runs(now - SHARES_S)],
    )


async def restore_oom_history(
    store: JobStore, registry: ModelRegistry, memory: MemoryTracker, clock: Callable[[], float]
) -> None:
    """Jobs like those that ran out of memory avoid the modes that failed."""
    for forced in await store.database.run(read_failed_modes, clock() - REMEMBERED_S):
        _avoid_failed_mode(registry, memory, await store.database.call(store.job, forced.job_id), forced)


async def requeue_unfinished(
    store: JobStore, registry: ModelRegistry, queue: JobQueue, clock: Callable[[], float]
) -> None:
    """Queue the jobs that have not ended; those whose model is gone fail."""
    for job in await store.database.call(store.requeue_interrupted, clock()):
        try:
            spec = registry.runnable(job.model, job.pixels, job.params, job.weights)
        except PlantainError as gone:
            await store.database.call(store.fail, job.id, error_of(gone), clock())
        else:
            queue.push(queue.queued(job, spec))


def _avoid_failed_mode(registry: ModelRegistry, memory: MemoryTracker, job: Job, forced: FailedMode) -> None:
    try:
        spec = registry.runnable(job.model, job.pixels, job.params, job.weights)
    except PlantainError:
        return  # the model is not here any more
    shape = shape_of(job.params, job.pixels)
    memory.avoid_mode(spec.weights.model, spec.need, forced.way, shape, forced.budget_bytes)
