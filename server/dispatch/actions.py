"""Performs what the scheduler and callers ask of workers: start, prefetch, evict, cancel, spawn, kill."""

import logging
from collections.abc import Sequence

from pipelines.base import ComponentStatus
from server.dispatch import completion
from server.dispatch.messages import QueuedJob
from server.dispatch.records import record_device
from server.dispatch.state import Effects, State
from server.dispatch.status import device_json
from server.dispatch.worker_state import PrefetchState, WorkerState
from server.scheduling.types import Action, Evict, Prefetch, Refuse, Start
from server.workers import protocol

log = logging.getLogger("plantain.dispatcher")


async def perform(state: State, effects: Effects, actions: Sequence[Action]) -> None:
    for action in actions:
        match action:
            case Evict(device, key):
                evict(state, effects, state.workers[device], key)
            case Prefetch():
                await prefetch(state, effects, state.workers[action.device], action)
            case Start(job_id, device):
                queued = state.queue.pop_for_start(job_id, effects.clock())
                await start_job(state, effects, queued, state.workers[device])
            case Refuse(job_id):
                await completion.refuse(state, effects, job_id)


async def start_job(state: State, effects: Effects, queued: QueuedJob, worker: WorkerState) -> None:
    """The job is `running` in the database before its worker gets it."""
    now = effects.clock()
    predicted_at = state.queue.take_prediction(queued.job_id, now)
    job = await effects.database.write(effects.jobs.start, queued.job_id, worker.id, now, predicted_at)
    if job is None:
        state.queue.on_finished(queued, 0.0)
        return
    mode = state.memory.mode_for_worker(job.id, queued.need, worker.snapshot)
    worker.start(queued, effects.clock())
    worker.supervisor.send(
        protocol.Run(
            job_id=job.id,
            weights=queued.weights,
            workflow=job.workflow,
            params=job.params,
            files=effects.files.staging_path(),
            output=effects.files.staging_path(job.output_name),
            way=mode,
            loras=queued.loras,
        )
    )


async def prefetch(state: State, effects: Effects, worker: WorkerState, action: Prefetch) -> None:
    queued = state.queue.jobs[action.job_id]
    names = {component.key: component.name for component in queued.weights.components}
    to_device = (*worker.still_arriving(queued.need), *action.to_device)  # a prefetch replaces the one before it
    targets = [(key, "device") for key in to_device] + [(key, "host") for key in action.to_host]
    components = tuple((key, names.get(key, "?"), queued.need.sizes[key], to) for key, to in targets)
    worker.begin_prefetch(PrefetchState(action.job_id, components))
    worker.supervisor.send(protocol.Prefetch(action.job_id, queued.weights, to_device, action.to_host))
    await publish_device_state(state, effects, worker)


def evict(state: State, effects: Effects, worker: WorkerState, key: str) -> None:
    state.memory.record_eviction(worker.snapshot, key, effects.clock())
    worker.supervisor.send(protocol.Evict(key))
    worker.remove({key})


def cancel(state: State, job_id: str) -> None:
    """A running job stops at its next step."""
    for worker in state.workers.values():
        if worker.job and worker.job.job_id == job_id:
            worker.request_cancel()
            worker.supervisor.send(protocol.Cancel(job_id))


def spawn(effects: Effects, worker: WorkerState) -> None:
    worker.starting(effects.clock())
    worker.supervisor.start()


def kill_stalled_workers(state: State, effects: Effects) -> None:
    """Kill each worker whose start or job shows no progress; its exit is handled like any other."""
    for worker in state.workers.values():
        match worker.stalled(effects.clock()):
            case "start":
                log.error("%s: killing the worker, its start timed out", worker.id)
                worker.supervisor.kill()
            case "job":
                log.error("%s: killing the worker, its job shows no progress", worker.id)
                worker.supervisor.kill()


async def publish_device_state(
    state: State, effects: Effects, worker: WorkerState, held: Sequence[ComponentStatus] | None = None
) -> None:
    """Store what the API and the command line show of a device, if it has changed; `held` is what it now reports."""
    if held is not None:
        state.memory.set_held(worker.id, held)
    device = device_json(state.memory, worker)
    if state.memory.has_changed(worker.id, device):
        await effects.database.write_transaction(record_device, worker.id, device, effects.clock())
