"""The one owner of queue, workers and residency. Everyone else sends it a message."""
# FROM server.loop: The dispatcher's run loop: it takes what has come, then decides once. Meanwhile nothing else changes the state.

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.dispatch.actions import Floor
from server.dispatch.admission import Admission, stopping
from server.dispatch.completion import Endings
from server.dispatch.events import on_remote_event
from server.dispatch.memory import MemoryTracker
from server.dispatch.messages import (
    CancelRequested,
    GpuMemoryReport,
    JobSubmitted,
    Message,
    PauseRequested,
    PriorityRequested,
    QueuedJob,
    RemoteEvent,
    RemoteJobSubmitted,
    RestartDue,
    Tick,
    WorkerEvent,
)
from server.dispatch.recovery import requeue_unfinished, restore_oom_history, restore_queue
from server.dispatch.state import Waiters
from server.dispatch.worker_state import WorkerState
from server.errors import InternalError
from server.files.store import FileStore
from server.jobs.job import Job
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry
from server.remote.job import RemoteJobEvent
from server.remote.runner import RemoteRunner
from server.scheduling import types
from server.scheduling.forecast import QueuePosition
from server.workers import protocol
from server.workers.devices import DeviceSpec, free_bytes
from server.workers.supervisor import OnEvent, Supervisor

log = logging.getLogger("plantain.dispatcher")


class Loop:
    """Once it is `leaving` it starts nothing more, and is `quiet` when nothing runs any more."""

    def __init__(
        self,
        inbox: asyncio.Queue[Message],
        floor: Floor,
        desk: RemoteRunner | None,
        clock: Callable[[], float],
    ) -> None:
        self.inbox, self.floor, self.desk, self.clock = inbox, floor, desk, clock
        self.database = floor.store.database
        self.store, self.backlog = floor.store, floor.backlog
        self.workers, self.endings = floor.workers, floor.endings
        self.leaving = False
        self.quiet = asyncio.Event()

    async def run(self) -> None:
        while True:
            if not self.leaving:
                await self.floor.perform(self.backlog.plan(self.floor.devices, self.clock()))
            elif not any(worker.runs for worker in self.workers.values()):
                self.quiet.set()
            await self._handle(await self.inbox.get())
            while not self.inbox.empty():
                await self._handle(self.inbox.get_nowait())

    async def _handle(self, message: Message) -> None:
        match message:
            case JobSubmitted(queued):
                self.backlog.add(queued)
            case CancelRequested(job_id, heard):
                await self._cancel(job_id)
                heard.set_result(None)
            case PriorityRequested(job_id, priority, heard):
                await self._prioritise(job_id, priority)
                heard.set_result(None)
            case PauseRequested(what, on, heard):
                await self._halt(what, on)
                heard.set_result(None)
            case Tick():
                self.floor.kill_the_hung()
            case GpuMemoryReport(free_bytes):
                await self.floor.hear_driver(free_bytes)
            case WorkerEvent(device, event):
                await self.floor.hear(self.workers[device], event)
            case RestartDue(device):
                self.floor.spawn(self.workers[device])
            case RemoteJobSubmitted(job) if self.desk:
                self.desk.start(job)
            case RemoteEvent(said):
                await on_remote_event(said, self.store, self.endings, self.clock())

    async def _cancel(self, job_id: str) -> None:
        if self.backlog.drop(job_id):
            self.endings.done(await self.database.write(self.store.cancel, job_id, self.clock()))
        if self.desk:
            self.desk.cancel(job_id)
        self.floor.cancel(job_id)

    async def _prioritise(self, job_id: str, priority: int) -> None:
        job = await self.database.write(self.store.prioritise, job_id, priority)
        if job and (queued := self.backlog.jobs.get(job_id)):
            self.backlog.put(replace(queued, priority=priority, job=job))

    async def _halt(self, what: str, on: bool) -> None:
        if on:
            await self.database.write(self.store.pause, what, self.clock())
            self.backlog.halted.add(what)
        else:
            await self.database.write(self.store.resume, what)
            self.backlog.halted.discard(what)
        if what in self.workers:
            self.workers[what].halted = on


Spawn = Callable[[DeviceSpec, Sequence[str], OnEvent], Supervisor]

STOP_TIMEOUT_S = 5.0
TICK_S = 1.0


class Dispatcher:
    """What others may ask of it, its start and its end. What it does is its loop's, its floor's and its endings'."""

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        shelf: ModelRegistry,
        devices: Sequence[DeviceSpec],
        *,
        desk: RemoteRunner | None = None,
        max_queued: int = 10_000,
        max_queued_each: int = 1_000,
        spawn: Spawn = Supervisor,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.files, self.shelf, self.clock = store, files, shelf, clock
        self.desk = desk
        if desk:
            desk.tell = self._desk_said
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.backlog = restore_queue(store, clock())
        self.watchers = Waiters()
        self.memory = MemoryTracker(store, devices)
        shelf.peaks = self.memory.peaks
        self.workers: dict[str, WorkerState] = {}
        to_fal = desk.start if desk and desk.connected else None
        self.endings = Endings(store, self.backlog, self.memory, self.watchers, self.workers, clock, to_fal)
        self.floor = Floor(self.endings, files, self._respawn_later)
        self.loop = Loop(self.inbox, self.floor, desk, clock)
        self.door = Admission(self.floor, desk, self.inbox, clock, max_queued, max_queued_each)
        self.submit, self.submit_remote = self.door.submit, self.door.submit_remote
        families = shelf.families()
        for device in devices:
            worker = WorkerState(spawn(device, families, self._worker_said), device.budget_bytes)
            worker.halted = device.id in self.backlog.halted
            self.workers[device.id] = worker
        self._ticking: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self.fallen: str | None = None

    # What others may ask

    async def start(self) -> None:
        """Take up the queue where the last server left it, start the workers and the run loop."""
        await restore_oom_history(self.store, self.shelf, self.memory, self.clock)
        await requeue_unfinished(self.store, self.shelf, self.backlog, self.clock)
        for job in await self.store.database.call(self.store.recover_remote, self.clock()):
            if self.desk:
                self.desk.start(job)
        for worker in self.workers.values():
            self.floor.spawn(worker)
        self._tick()
        self._asking = asyncio.create_task(self._ask_driver(), name="driver")
        self._running = asyncio.create_task(self.loop.run(), name="dispatcher")
        self._running.add_done_callback(self._fell)

    async def leave(self, patience_s: float) -> None:
        """Start nothing more, and wait for the running jobs, so long at most. Others go on at the next start."""
        self.loop.leaving = self.door.closed = True
        for job_id in self.backlog.jobs:
            self.watchers.tell(job_id, stopping())
        self.inbox.put_nowait(Tick())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.loop.quiet.wait(), patience_s)

    async def stop(self) -> None:
        """End the workers; jobs that were running go on at the next start, at no cost of an attempt."""
        if self.desk:
            await self.desk.stop()  # while the loop still writes down what is on its way to fal
        if self._ticking:
            self._ticking.cancel()
        for task in (self._asking, self._running):
            if task:
                task.cancel()
        for worker in self.workers.values():
            if worker.runs:
                await self.store.database.call(
                    self.store.requeue, worker.runs.job_id, self.clock(), count_attempt=False
                )
        await asyncio.gather(*(worker.supervisor.stop(STOP_TIMEOUT_S) for worker in self.workers.values()))
        self.watchers.tell_all(stopping())

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended. Raises KeyError; Unavailable when the server stops first."""
        future = self.watchers.join(job_id)
        try:
            job = await self.store.database.call(self.store.job, job_id)
            return job if job.is_final else await future
        finally:
            self.watchers.leave(job_id, future)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job: a queued one at once, a running one at its next step. Returns the job as it is then."""
        heard = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(CancelRequested(job_id, heard))
        await heard
        return await self.store.database.call(self.store.job, job_id)

    async def prioritise(self, job_id: str, priority: int) -> Job:
        """Put a waiting job in front of the others (over zero) or behind them (under zero); the highest goes first."""
        heard = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(PriorityRequested(job_id, priority, heard))
        await heard
        return await self.store.database.call(self.store.job, job_id)

    async def halt(self, what: str, on: bool) -> None:
        """Let the queue, or a device, start nothing until it is resumed. What runs, runs on."""
        heard = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(PauseRequested(what, on, heard))
        await heard

    @property
    def progress(self) -> Mapping[str, protocol.Progress]:
        return self.endings.progress

    @property
    def queue(self) -> Mapping[str, QueuedJob]:
        return self.backlog.jobs

    @property
    def devices(self) -> list[types.DeviceState]:
        return self.floor.devices

    @property
    def trouble(self) -> str | None:
        """What keeps the server from working, for a person."""
        return self.fallen or self.store.database.write_error

    def seconds_left(self, job_id: str) -> float | None:
        """Until a running job should have ended."""
        return self.floor.seconds_left(job_id)

    def state(self, worker: WorkerState) -> dict[str, Any]:
        """A worker's device as people and programs see it."""
        return self.floor.state(worker)

    @property
    def ready(self) -> bool:
        """Whether a worker can serve now and what it does can be written down."""
        serving = {"idle", "loading", "running"}
        return not self.trouble and any(worker.status in serving for worker in self.workers.values())

    def position(self, job_id: str) -> int | None:
        """1 for the job that is next; None for one that does not wait."""
        place = self.place(job_id)
        return place.position if place else None

    def place(self, job_id: str) -> QueuePosition | None:
        """Where a job stands in the queue, and when it should start; None for one that does not wait."""
        if job_id not in self.backlog.jobs:
            return None
        return self.backlog.places(list(self.workers.values()), self.clock())[job_id]

    def reason(self, job_id: str) -> str | None:
        """Why a job waits, for a person."""
        if self.loop.leaving:
            return "the server is stopping; the job goes on when it is back"
        queued = self.backlog.jobs.get(job_id)
        return self.backlog.reason(queued, list(self.workers.values()), self.clock()) if queued else None

    # Around the loop: what it is told, and that it fell

    def _tick(self) -> None:
        self.inbox.put_nowait(Tick())
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def _ask_driver(self) -> None:
        """Where there are GPUs: what the driver calls free comes as a message, so that a plan asks nobody."""
        specs = [worker.supervisor.device for worker in self.workers.values()]
        while gpus := [spec for spec in specs if spec.torch_device.startswith("cuda")]:
            self.inbox.put_nowait(GpuMemoryReport(await asyncio.to_thread(free_bytes, gpus)))
            await asyncio.sleep(TICK_S)

    def _respawn_later(self, device: str, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self.inbox.put_nowait, RestartDue(device))

    def _worker_said(self, device: str, event: protocol.Event) -> None:
        self.inbox.put_nowait(WorkerEvent(device, event))

    def _desk_said(self, said: RemoteJobEvent) -> None:
        self.inbox.put_nowait(RemoteEvent(said))

    def _fell(self, loop: asyncio.Task[None]) -> None:
        """A bug, since nothing else ends the loop: say so to whoever asks, and take the queue up at the next start."""
        if not loop.cancelled():
            self.fallen = f"the dispatcher fell: {loop.exception()!r}"
            log.critical("%s", self.fallen, exc_info=loop.exception())
            self.watchers.tell_all(InternalError("The server is in trouble; its log says why."))
