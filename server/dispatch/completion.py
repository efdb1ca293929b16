"""Job completion: success, failure, cancellation, retry after a crash or out of memory, fallback to fal.ai.

Records duration and peak memory of what ran.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipelines.base import Peak
from server.dispatch import records
from server.dispatch.messages import QueuedJob
from server.dispatch.state import Effects, State
from server.dispatch.worker_state import WorkerState
from server.errors import DoesNotFit
from server.jobs.job import Job, error_of
from server.jobs.store import NO_PROGRESS, WORKER_CRASHED
from server.scheduling.need import Need, shape_of
from server.scheduling.placement import refusal
from server.workers import protocol

log = logging.getLogger("plantain.dispatcher")


async def succeed(state: State, effects: Effects, worker: WorkerState, event: protocol.Succeeded) -> None:
    await record_peaks(state, effects, worker, event.peaks)
    queued, load_s = worker.job, worker.load_s
    duration = {"duration": event.duration_s} if event.duration_s else {}
    output = {"width": event.width, "height": event.height} | duration
    await finish(state, effects, worker, effects.jobs.succeed, event.job_id, output, effects.clock())
    if queued:
        await record_duration(state, effects, queued, max(0.0, event.run_s - load_s))


async def cancel(state: State, effects: Effects, worker: WorkerState, job_id: str) -> None:
    await finish(state, effects, worker, effects.jobs.cancel, job_id, effects.clock())


async def fail(state: State, effects: Effects, worker: WorkerState, event: protocol.Failed) -> None:
    """A job that ran out of memory is retried in other modes and places as long as there are any, at fal.ai last."""
    message = event.message
    if event.code == "OUT_OF_MEMORY" and worker.job and await retry_after_oom(state, effects, worker, worker.job):
        return
    if attempts := state.memory.attempts_of(event.job_id):
        message = f"{message} Tried: {'; '.join(attempts)}."
    error = {"error": message, "code": event.code}
    await finish(state, effects, worker, effects.jobs.fail, event.job_id, error, effects.clock())


async def refuse(state: State, effects: Effects, job_id: str) -> None:
    """No device can hold a waiting job, as was learned since its submit: it runs at fal.ai, or fails."""
    queued = state.queue.remove(job_id)
    if queued and await fall_back_to_remote(state, effects, queued.job):
        return
    reason = refusal(queued.need, state.devices) if queued else ""
    error = error_of(DoesNotFit(f"The job {reason}."))
    notify_waiters(state, await effects.database.write(effects.jobs.fail, job_id, error, effects.clock()))


async def requeue(state: State, effects: Effects, worker: WorkerState, need: Need | None = None) -> None:
    """Because its worker died; or, with another `need`, because memory ran out, which counts as no attempt."""
    queued, timed_out = worker.give_up_job()
    if queued is None:
        return
    state.progress.pop(queued.job_id, None)
    job = await effects.database.write(
        effects.jobs.requeue,
        queued.job_id,
        effects.clock(),
        count_attempt=need is None,
        error=NO_PROGRESS if timed_out else WORKER_CRASHED,
    )
    if job and not job.is_final:
        state.queue.push_front(replace(queued, need=need or queued.need, job=job))
    else:
        state.queue.on_finished(queued, 0.0)
        notify_waiters(state, job)


async def retry_after_oom(state: State, effects: Effects, worker: WorkerState, queued: QueuedJob) -> bool:
    """False if nothing is left to try. A job whose cancellation was requested meanwhile ends as cancelled."""
    worker.out_of_memory()
    if worker.cancel_requested:
        await cancel(state, effects, worker, queued.job_id)
    elif need := await next_attempt(state, effects, worker, queued):
        await requeue(state, effects, worker, need)
        worker.idle()
    elif await fall_back_to_remote(state, effects, queued.job):
        release_worker(state, effects, worker)
    else:
        return False
    return True


async def next_attempt(state: State, effects: Effects, worker: WorkerState, queued: QueuedJob) -> Need | None:
    """Records the failed attempt; the need of the next one, None if no other mode or device is left here."""
    failed, following, need = state.memory.record_oom(queued.job.id, queued.need, worker.snapshot, state.devices)
    await effects.database.write_transaction(
        records.record_attempt,
        queued.job.id,
        queued.job.model,
        failed,
        following,
        effects.clock(),
        budget_bytes=worker.snapshot.budget_bytes,
        remote_next=can_fall_back(effects, queued.job),
    )
    return need


def can_fall_back(effects: Effects, job: Job) -> bool:
    return bool(job.remote_fallback and effects.remote and effects.remote.connected)


async def fall_back_to_remote(state: State, effects: Effects, job: Job) -> bool:
    """Run the job at fal.ai, if it may. If the server dies before it is sent, it is sent at the next start."""
    if not can_fall_back(effects, job):
        return False
    remote_job = await effects.database.write(effects.jobs.move_to_remote, job.id)
    if remote_job is None or effects.remote is None:
        return False
    log.warning("job %s: falling back to fal.ai, no local device has enough memory", job.id)
    state.progress.pop(job.id, None)
    state.memory.forget(job.id)
    effects.remote.start(remote_job)
    return True


async def record_peaks(state: State, effects: Effects, worker: WorkerState, peaks: Sequence[Peak]) -> None:
    """Peak memory of the run, for the needs of later jobs."""
    if worker.job and peaks:
        job, model = worker.job.job, worker.job.weights.model
        shape, mode = shape_of(job.params, job.pixels), state.memory.mode_without_layout(job.id)
        if maxima := state.memory.peaks.new_maxima(model, mode, shape, peaks):
            kind, write = state.memory.peaks.device_kind, effects.database.write_transaction
            rows = await write(records.record_peaks, model, mode, shape, kind, maxima, effects.clock())
            for measurement in rows:
                state.memory.peaks.add(measurement)
        state.memory.avoid_modes(job.id, model, shape, worker.snapshot)


async def record_duration(state: State, effects: Effects, queued: QueuedJob, run_s: float) -> None:
    """`run_s` leaves out the time that weights took to load."""
    timing = state.queue.record_duration(queued, run_s)
    await effects.database.write_transaction(records.record_timing, timing)


async def record_remote_duration(state: State, effects: Effects, job: Job) -> None:
    """How long a job took at fal.ai, its queue included."""
    if timing := state.queue.record_remote_duration(job):
        await effects.database.write_transaction(records.record_timing, timing)


async def finish(
    state: State, effects: Effects, worker: WorkerState, write: Callable[..., Job | None], *values: Any
) -> None:
    """Store how the worker's job ended, free the worker and notify who waits."""
    job = await effects.database.write(write, *values)
    release_worker(state, effects, worker)
    notify_waiters(state, job)


def release_worker(state: State, effects: Effects, worker: WorkerState) -> None:
    """The worker is idle; its user is charged the device time."""
    if worker.job:
        state.queue.on_finished(worker.job, max(0.0, effects.clock() - worker.started_at))
    worker.finish()


def notify_waiters(state: State, job: Job | None) -> None:
    if job:
        state.progress.pop(job.id, None)
        state.memory.forget(job.id)
        state.waiters.notify(job.id, job)
