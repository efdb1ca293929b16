"""Handles what workers, remote jobs and the GPU driver report."""

import asyncio
import logging
from collections.abc import Mapping
from typing import TypeVar

from server.dispatch import completion
from server.dispatch.actions import publish_device_state
from server.dispatch.state import Effects, State
from server.dispatch.worker_state import WorkerState
from server.jobs.job import error_of
from server.remote.job import RemoteJobEvent, RemoteJobFailed, RemoteSucceeded, SubmitStarted, Submitted
from server.workers import protocol

log = logging.getLogger("plantain.dispatcher")
T = TypeVar("T")

MAX_RESTART_DELAY_S = 30.0


async def on_worker_event(state: State, effects: Effects, worker: WorkerState, event: protocol.Event) -> None:
    match event:
        case protocol.Ready(link_bytes_per_s):
            worker.ready(link_bytes_per_s)
            await publish_device_state(state, effects, worker, ())
        case protocol.Progress(job_id):
            worker.progress(effects.clock())
            state.progress[job_id] = event
        case protocol.Resident(components, held):
            worker.report_resident(components, tuple((each.key, each.host_bytes) for each in held if each.host_bytes))
            await publish_device_state(state, effects, worker, held)
        case protocol.Prefetched(job_id, error):
            await on_prefetched(state, effects, worker, job_id, error)
        case protocol.Died(exit_code):
            await on_worker_exit(state, effects, worker, exit_code)
        case protocol.Succeeded():
            await completion.succeed(state, effects, worker, event)
        case protocol.Cancelled(job_id):
            await completion.cancel(state, effects, worker, job_id)
        case protocol.Failed():
            await completion.fail(state, effects, worker, event)


async def on_prefetched(state: State, effects: Effects, worker: WorkerState, job_id: str, error: str) -> None:
    """The running job is not affected; what was not prefetched the next job loads itself, or fails at."""
    worker.end_prefetch(job_id, error)
    if error:
        log.warning("%s: prefetch for job %s is incomplete: %s", worker.id, job_id, error)
    await publish_device_state(state, effects, worker)


async def on_worker_exit(state: State, effects: Effects, worker: WorkerState, exit_code: int) -> None:
    """Its job runs again or fails, and the worker is restarted with back-off."""
    log.warning("%s: worker exited with %s", worker.id, exit_code)
    worker.exited()
    await publish_device_state(state, effects, worker, ())
    await completion.requeue(state, effects, worker)
    effects.restart_later(worker.id, min(MAX_RESTART_DELAY_S, worker.restart_delay_s))


async def on_gpu_memory_report(state: State, effects: Effects, free_bytes: Mapping[str, int]) -> None:
    """Memory that other processes use bounds what is planned from now on."""
    for worker in state.workers.values():
        if worker.id in free_bytes:
            worker.observe_free_memory(free_bytes[worker.id], effects.clock())
            await publish_device_state(state, effects, worker)


async def on_remote_event(state: State, effects: Effects, event: RemoteJobEvent) -> None:
    write, jobs, now = effects.database.write, effects.jobs, effects.clock()
    match event:
        case SubmitStarted(job_id, stored):
            _reply(stored, await write(jobs.start_remote, job_id, now))
        case Submitted(job_id, request_id, stored):
            await write(jobs.record_request_id, job_id, request_id)
            _reply(stored, None)
        case protocol.Progress(job_id):
            state.progress[job_id] = event
        case RemoteSucceeded(job_id, output):
            if job := await write(jobs.succeed, job_id, output.output, now, output.name):
                await completion.record_remote_duration(state, effects, job)
                completion.notify_waiters(state, job)
        case protocol.Cancelled(job_id):
            completion.notify_waiters(state, await write(jobs.cancel, job_id, now))
        case RemoteJobFailed(job_id, error):
            completion.notify_waiters(state, await write(jobs.fail, job_id, error_of(error), now))


def _reply(future: asyncio.Future[T], result: T) -> None:
    """The remote job that waits for it may have been stopped meanwhile."""
    if not future.done():
        future.set_result(result)
