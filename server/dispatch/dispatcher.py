"""The dispatcher: the single owner of the queue, the workers and their residency. Others send it messages."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from server.dispatch import actions, completion, events
from server.dispatch.admission import Admission, stopping
from server.dispatch.memory import MemoryTracker
from server.dispatch.messages import (
    CancelRequested,
    GpuMemoryReport,
    JobSubmitted,
    Message,
    PauseRequested,
    PriorityRequested,
    RemoteEvent,
    RemoteJobSubmitted,
    RestartDue,
    Tick,
    WorkerEvent,
)
from server.dispatch.queue import WHOLE_QUEUE
from server.dispatch.recovery import requeue_unfinished, restore_oom_history, restore_queue
from server.dispatch.state import Effects, State
from server.dispatch.status import Status
from server.dispatch.worker_state import WorkerState
from server.errors import InternalError
from server.files.store import FileStore
from server.jobs.job import Job, NewJob
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry, RunSpec
from server.remote.runner import RemoteRunner
from server.workers import protocol
from server.workers.devices import DeviceSpec, free_bytes
from server.workers.supervisor import OnEvent, Supervisor

log = logging.getLogger("plantain.dispatcher")

Spawn = Callable[[DeviceSpec, Sequence[str], OnEvent], Supervisor]

STOP_TIMEOUT_S = 5.0
TICK_S = 1.0


class Dispatcher:
    """`submit`, `cancel`, `wait` and the like are called by others; `status` is what they may see.

    One task runs `_run`: it takes the messages that have come, then plans once and performs the plan's actions.
    Nothing else changes the state. `remote` reports its events to `inbox`.
    """

    def __init__(
        self,
        jobs: JobStore,
        files: FileStore,
        registry: ModelRegistry,
        devices: Sequence[DeviceSpec],
        *,
        inbox: asyncio.Queue[Message] | None = None,
        remote: RemoteRunner | None = None,
        max_queued: int = 10_000,
        max_queued_each: int = 1_000,
        spawn: Spawn = Supervisor,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry
        self.inbox: asyncio.Queue[Message] = inbox or asyncio.Queue()
        queue = restore_queue(jobs, clock())
        workers = {
            device.id: WorkerState(
                spawn(device, registry.families(), self._on_worker_event),
                device.budget_bytes,
                draining=device.id in queue.paused,
            )
            for device in devices
        }
        self.state = State(queue, workers, MemoryTracker(registry.peaks))
        self.effects = Effects(jobs.database, jobs, files, remote, clock, self._restart_later)
        self.status = Status(self.state, clock)
        self.admission = Admission(self.state, self.effects, self.inbox, max_queued, max_queued_each)
        self._drained = asyncio.Event()
        self._tick_timer: asyncio.TimerHandle | None = None
        self._gpu_memory_task: asyncio.Task[None] | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self.loop_error: str | None = None

    # What others may call

    async def start(self) -> None:
        """Restore the queue of the last server, start the workers and the run loop."""
        jobs, database, clock = self.effects.jobs, self.effects.database, self.effects.clock
        await restore_oom_history(jobs, self.registry, self.state.memory, clock)
        await requeue_unfinished(jobs, self.registry, self.state.queue, clock)
        remote_jobs = await database.call(jobs.recover_remote, clock())
        if self.effects.remote:
            for job in remote_jobs:
                self.effects.remote.start(job)
        for worker in self.state.workers.values():
            actions.spawn(self.effects, worker)
        self._tick()
        self._gpu_memory_task = asyncio.create_task(self._poll_gpu_memory(), name="gpu memory")
        self._loop_task = asyncio.create_task(self._run(), name="dispatcher")
        self._loop_task.add_done_callback(self._on_loop_error)

    async def drain(self, timeout_s: float) -> None:
        """Start nothing more, and wait for the running jobs up to `timeout_s`. The others go on at the next start."""
        self.state.begin_drain()
        for job_id in self.state.queue.jobs:
            self.state.waiters.notify(job_id, stopping())
        self.inbox.put_nowait(Tick())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), timeout_s)

    async def stop(self) -> None:
        """Stop the workers; jobs that were running are queued again for the next start, at no cost of an attempt."""
        if self.effects.remote:
            await self.effects.remote.stop()  # while the loop still stores request ids of submits under way
        if self._tick_timer:
            self._tick_timer.cancel()
        for task in (self._gpu_memory_task, self._loop_task):
            if task:
                task.cancel()
        jobs, database, clock = self.effects.jobs, self.effects.database, self.effects.clock
        for worker in self.state.workers.values():
            if worker.job:
                await database.call(jobs.requeue, worker.job.job_id, clock(), count_attempt=False)
        await asyncio.gather(*(worker.supervisor.stop(STOP_TIMEOUT_S) for worker in self.state.workers.values()))
        self.state.waiters.fail_all(stopping())

    async def submit(self, new: NewJob, spec: RunSpec) -> tuple[Job, int]:
        """Admit a job that runs here; returns it and the balance left. See `Admission.submit` for what it raises."""
        return await self.admission.submit(new, spec)

    async def submit_remote(self, new: NewJob) -> tuple[Job, int]:
        """Admit a job that runs at fal.ai."""
        return await self.admission.submit_remote(new)

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended. Raises KeyError; Unavailable when the server stops first."""
        future = self.state.waiters.add(job_id)
        try:
            job = await self.effects.database.call(self.effects.jobs.job, job_id)
            return job if job.is_final else await future
        finally:
            self.state.waiters.remove(job_id, future)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job: a queued one at once, a running one at its next step. Returns the job as it is then."""
        done = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(CancelRequested(job_id, done))
        await done
        return await self.effects.database.call(self.effects.jobs.job, job_id)

    async def set_priority(self, job_id: str, priority: int) -> Job:
        """Waiting jobs with a higher priority start first; 0 is normal."""
        done = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(PriorityRequested(job_id, priority, done))
        await done
        return await self.effects.database.call(self.effects.jobs.job, job_id)

    async def pause_queue(self) -> None:
        """Nothing starts until `resume_queue`, restarts included; running jobs finish."""
        await self._pause(WHOLE_QUEUE, True)

    async def resume_queue(self) -> None:
        await self._pause(WHOLE_QUEUE, False)

    async def drain_device(self, device: str) -> None:
        """The device finishes its job and starts nothing until `resume_device`, restarts included."""
        await self._pause(device, True)

    async def resume_device(self, device: str) -> None:
        await self._pause(device, False)

    @property
    def unhealthy_reason(self) -> str | None:
        """What keeps the server from working, for a person."""
        return self.loop_error or self.effects.database.write_error

    @property
    def ready(self) -> bool:
        """Whether a worker can run a job now and its outcome can be stored."""
        return not self.unhealthy_reason and self.status.serving

    # The run loop

    async def _run(self) -> None:
        while True:
            now = self.effects.clock()
            if self.state.drained:
                self._drained.set()
            elif self.state.queue.jobs and not self.state.draining:
                await actions.perform(self.state, self.effects, self.state.queue.plan(self.state.devices, now))
                self.state.queue.predict_starts(list(self.state.workers.values()), now)
            await self._handle(await self.inbox.get())
            while not self.inbox.empty():
                await self._handle(self.inbox.get_nowait())

    async def _handle(self, message: Message) -> None:
        state, effects = self.state, self.effects
        match message:
            case JobSubmitted(queued):
                state.queue.push(queued)
            case RemoteJobSubmitted(job) if effects.remote:
                effects.remote.start(job)
            case CancelRequested(job_id, done):
                await self._cancel(job_id)
                done.set_result(None)
            case PriorityRequested(job_id, priority, done):
                await self._set_priority(job_id, priority)
                done.set_result(None)
            case PauseRequested(what, paused, done):
                await self._set_paused(what, paused)
                done.set_result(None)
            case Tick():
                actions.kill_stalled_workers(state, effects)
            case GpuMemoryReport(free):
                await events.on_gpu_memory_report(state, effects, free)
            case WorkerEvent(device, event):
                await events.on_worker_event(state, effects, state.workers[device], event)
            case RemoteEvent(remote_event):
                await events.on_remote_event(state, effects, remote_event)
            case RestartDue(device):
                actions.spawn(effects, state.workers[device])

    async def _cancel(self, job_id: str) -> None:
        if self.state.queue.remove(job_id):
            job = await self.effects.database.write(self.effects.jobs.cancel, job_id, self.effects.clock())
            completion.notify_waiters(self.state, job)
        if self.effects.remote:
            self.effects.remote.cancel(job_id)
        actions.cancel(self.state, job_id)

    async def _set_priority(self, job_id: str, priority: int) -> None:
        job = await self.effects.database.write(self.effects.jobs.set_priority, job_id, priority)
        if job and (queued := self.state.queue.jobs.get(job_id)):
            self.state.queue.replace(dataclasses.replace(queued, priority=priority, job=job))

    async def _set_paused(self, what: str, paused: bool) -> None:
        if paused:
            await self.effects.database.write(self.effects.jobs.pause, what, self.effects.clock())
        else:
            await self.effects.database.write(self.effects.jobs.resume, what)
        self.state.queue.set_paused(what, paused)
        if what in self.state.workers:
            self.state.workers[what].drain(paused)

    # Where messages come from

    async def _pause(self, what: str, paused: bool) -> None:
        done = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(PauseRequested(what, paused, done))
        await done

    def _tick(self) -> None:
        self.inbox.put_nowait(Tick())
        self._tick_timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def _poll_gpu_memory(self) -> None:
        """The driver's free-memory figures come as messages, so that planning does not wait for the driver."""
        while gpus := [spec for spec in self.status.specs if spec.torch_device.startswith("cuda")]:
            self.inbox.put_nowait(GpuMemoryReport(await asyncio.to_thread(free_bytes, gpus)))
            await asyncio.sleep(TICK_S)

    def _restart_later(self, device: str, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self.inbox.put_nowait, RestartDue(device))

    def _on_worker_event(self, device: str, event: protocol.Event) -> None:
        self.inbox.put_nowait(WorkerEvent(device, event))

    def _on_loop_error(self, task: asyncio.Task[None]) -> None:
        """The run loop ends only by a bug: fail who waits; the queue is restored at the next start."""
        if not task.cancelled():
            self.loop_error = f"the dispatcher's run loop failed: {task.exception()!r}"
            log.critical("%s", self.loop_error, exc_info=task.exception())
            self.state.waiters.fail_all(InternalError("The server is in trouble; its log says why."))
