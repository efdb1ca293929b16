"""The one owner of queue, workers and residency. Everyone else sends it a message."""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from pipelines.base import Held, Peak
from server import protocol, scheduler
from server.backlog import Backlog
from server.devices import DeviceSpec
from server.errors import ConcurrencyLimit, DoesNotFit, InternalError, PlantainError, QueueFull, Unavailable
from server.forecast import Place
from server.jobs import Job, NewJob
from server.memory import Memory
from server.outputs import Files
from server.remote import errand
from server.remote.desk import Desk
from server.roster import (
    CancelAsked,
    DeskSaid,
    HaltAsked,
    Message,
    PriorityAsked,
    Queued,
    RespawnDue,
    Submitted,
    SubmittedRemote,
    Tick,
    Worker,
    WorkerSaid,
)
from server.scheduler import Action, Evict, Refuse, Start
from server.shelf import Runnable, Shelf
from server.store import HUNG, INTERRUPTED, Store, error_of
from server.supervisor import OnEvent, Supervisor
from server.timings import hang_s, read_timings, record_timing
from server.vram import Need, shape_of
from server.watchers import Watchers

log = logging.getLogger("plantain.dispatcher")

P = ParamSpec("P")
T = TypeVar("T")
Spawn = Callable[[DeviceSpec, Sequence[str], OnEvent], Supervisor]

LONGEST_RESPAWN_DELAY_S = 30.0
STORE_RETRY_S = 1.0
STOP_PATIENCE_S = 5.0
TICK_S = 1.0
STOPPING = Unavailable("The server is stopping; the job goes on when it is back.")


class Dispatcher:
    """Decides by `plan()`, performs what it says, and writes down what came of it."""

    def __init__(
        self,
        store: Store,
        files: Files,
        shelf: Shelf,
        devices: Sequence[DeviceSpec],
        *,
        desk: Desk | None = None,
        max_queued: int = 10_000,
        max_queued_each: int = 1_000,
        spawn: Spawn = Supervisor,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.files, self.shelf, self.clock = store, files, shelf, clock
        self.max_queued, self.max_queued_each = max_queued, max_queued_each
        self.desk = desk
        if desk:
            desk.tell = self._desk_said
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.backlog = Backlog(read_timings(store.db), store.halted())
        self.leaving = False
        self.quiet = asyncio.Event()
        self.progress: dict[str, protocol.Progress] = {}
        self.watchers = Watchers()
        self.trouble: str | None = None
        self.memory = Memory(store, devices)
        shelf.peaks = self.memory.peaks
        families = shelf.families()
        self.workers = {
            device.id: Worker(spawn(device, families, self._worker_said), device.budget_bytes) for device in devices
        }
        for worker in self.workers.values():
            worker.halted = worker.id in self.backlog.halted
        self._ticking: asyncio.TimerHandle | None = None
        self._loop: asyncio.Task[None] | None = None

    # What others may ask

    async def start(self) -> None:
        """Take up the queue where the last server left it, start the workers and the run loop."""
        for job in await self.store.call(self.store.recover, self.clock()):
            await self._take_up(job)
        for job in await self.store.call(self.store.recover_remote, self.clock()):
            await self._handle(SubmittedRemote(job))
        for worker in self.workers.values():
            worker.supervisor.start()
        self._tick()
        self._loop = asyncio.create_task(self._run(), name="dispatcher")
        self._loop.add_done_callback(self._fell)

    async def leave(self, patience_s: float) -> None:
        """Start nothing more, and wait for the running jobs, so long at most. Others go on at the next start."""
        self.leaving = True
        for job_id in self.backlog.jobs:
            self.watchers.tell(job_id, STOPPING)
        self.inbox.put_nowait(Tick())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.quiet.wait(), patience_s)

    async def stop(self) -> None:
        """End the workers; jobs that were running go on at the next start, at no cost of an attempt."""
        if self.desk:
            await self.desk.stop()  # while the loop still writes down what is on its way to fal
        if self._ticking:
            self._ticking.cancel()
        if self._loop:
            self._loop.cancel()
        for worker in self.workers.values():
            if worker.runs:
                await self.store.call(self.store.requeue, worker.runs.job_id, self.clock(), count_attempt=False)
        await asyncio.gather(*(worker.supervisor.stop(STOP_PATIENCE_S) for worker in self.workers.values()))
        self.watchers.tell_all(STOPPING)

    async def submit(self, new: NewJob, runnable: Runnable) -> tuple[Job, int]:
        """Charge and queue; returns the job and the balance left. Raises DoesNotFit, QueueFull, InsufficientCredits."""
        if refusal := scheduler.refusal(runnable.need, self.devices):
            raise DoesNotFit(f"{new.model} {refusal}.", needBytes=runnable.need.total_bytes)
        self._check_room(new.user_id)
        return await asyncio.shield(self._accept(new, runnable))

    async def submit_remote(self, new: NewJob) -> tuple[Job, int]:
        """The same for a job that runs at fal, where it waits in fal's own queue."""
        if self.leaving:
            raise STOPPING
        if self.desk and len(self.desk.tasks) + self.inbox.qsize() >= self.max_queued:
            raise QueueFull(f"The queue is full: {self.max_queued} jobs wait.", headers={"Retry-After": "30"})
        return await asyncio.shield(self._accept_remote(new))

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended. Raises KeyError; Unavailable when the server stops first."""
        future = self.watchers.join(job_id)
        try:
            job = await self.store.call(self.store.job, job_id)
            return job if job.is_final else await future
        finally:
            self.watchers.leave(job_id, future)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job: a queued one at once, a running one at its next step. Returns the job as it is then."""
        heard = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(CancelAsked(job_id, heard))
        await heard
        return await self.store.call(self.store.job, job_id)

    async def prioritise(self, job_id: str, priority: int) -> Job:
        """Put a waiting job in front of the others (over zero) or behind them (under zero); the highest goes first."""
        heard = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(PriorityAsked(job_id, priority, heard))
        await heard
        return await self.store.call(self.store.job, job_id)

    async def halt(self, what: str, on: bool) -> None:
        """Let the queue, or a device, start nothing until it is resumed. What runs, runs on."""
        heard = asyncio.get_running_loop().create_future()
        self.inbox.put_nowait(HaltAsked(what, on, heard))
        await heard

    @property
    def queue(self) -> Mapping[str, Queued]:
        return self.backlog.jobs

    @property
    def devices(self) -> list[scheduler.Device]:
        return [worker.view for worker in self.workers.values()]

    @property
    def ready(self) -> bool:
        """Whether a worker can serve now and what it does can be written down."""
        serving = {"idle", "loading", "running"}
        return not self.trouble and any(worker.status in serving for worker in self.workers.values())

    def position(self, job_id: str) -> int | None:
        """1 for the job that is next; None for one that does not wait."""
        place = self.place(job_id)
        return place.position if place else None

    def place(self, job_id: str) -> Place | None:
        """Where a job stands in the queue, and when it should start; None for one that does not wait."""
        if job_id not in self.backlog.jobs:
            return None
        return self.backlog.places(list(self.workers.values()), self.clock())[job_id]

    def reason(self, job_id: str) -> str | None:
        """Why a job waits, for a person."""
        if self.leaving:
            return "the server is stopping; the job goes on when it is back"
        queued = self.backlog.jobs.get(job_id)
        return self.backlog.reason(queued, list(self.workers.values()), self.clock()) if queued else None

    def seconds_left(self, job_id: str) -> float | None:
        """Until a running job should have ended."""
        ends = [worker.ends_at for worker in self.workers.values() if worker.runs and worker.runs.job_id == job_id]
        return max(0.0, ends[0] - self.clock()) if ends else None

    def state(self, worker: Worker) -> dict[str, Any]:
        """A worker's device as people and programs see it."""
        runs = worker.runs.job_id if worker.runs else None
        return self.memory.state(worker.supervisor.device, worker.view, worker.status, runs)

    # The run loop

    async def _run(self) -> None:
        """Take what has come, then decide once."""
        while True:
            if not self.leaving:
                await self._perform_all(self.backlog.plan(self.devices, self.clock()))
            elif not any(worker.runs for worker in self.workers.values()):
                self.quiet.set()
            await self._handle(await self.inbox.get())
            while not self.inbox.empty():
                await self._handle(self.inbox.get_nowait())

    async def _handle(self, message: Message) -> None:
        match message:
            case Submitted(queued):
                self.backlog.add(queued)
            case CancelAsked(job_id, heard):
                await self._cancel(job_id)
                heard.set_result(None)
            case PriorityAsked(job_id, priority, heard):
                await self._prioritise(job_id, priority)
                heard.set_result(None)
            case HaltAsked(what, on, heard):
                await self._halt(what, on)
                heard.set_result(None)
            case Tick():
                self._look_for_the_hung()
            case WorkerSaid(device, event):
                await self._hear(self.workers[device], event)
            case RespawnDue(device):
                self.workers[device].status = "starting"
                self.workers[device].supervisor.start()
            case SubmittedRemote(job) if self.desk:
                self.desk.start(job)
            case DeskSaid(said):
                await self._hear_desk(said)

    async def _hear_desk(self, said: errand.Said) -> None:
        match said:
            case errand.HandingOver(job_id, written):
                _answer(written, await self._write(self.store.start_remote, job_id, self.clock()))
            case errand.HandedOver(job_id, request_id, kept):
                await self._write(self.store.keep_request_id, job_id, request_id)
                _answer(kept, None)
            case protocol.Progress(job_id):
                self.progress[job_id] = said
            case errand.Finished(job_id, made):
                self._done(await self._write(self.store.succeed, job_id, made.output, self.clock(), made.name))
            case protocol.Cancelled(job_id):
                self._done(await self._write(self.store.cancel, job_id, self.clock()))
            case errand.Broken(job_id, error):
                self._done(await self._write(self.store.fail, job_id, error_of(error), self.clock()))

    async def _hear(self, worker: Worker, event: protocol.Event) -> None:
        match event:
            case protocol.Ready(link_bytes_per_s):
                worker.status = "idle"
                worker.link_bytes_per_s = link_bytes_per_s or worker.link_bytes_per_s
                await self._show(worker, ())
            case protocol.Progress(job_id):
                worker.status, worker.sign_at = "running", self.clock()
                self.progress[job_id] = event
            case protocol.Resident(components, held):
                worker.resident = components
                await self._show(worker, held)
            case protocol.Died(exit_code):
                await self._mourn(worker, exit_code)
            case protocol.Succeeded(job_id, width, height, run_s, duration_s, peaks):
                await self._learn(worker, peaks)
                await self._learn_time(worker, run_s)
                output = {"width": width, "height": height} | ({"duration": duration_s} if duration_s else {})
                await self._end(worker, self.store.succeed, job_id, output, self.clock())
            case protocol.Cancelled(job_id):
                await self._end(worker, self.store.cancel, job_id, self.clock())
            case protocol.Failed(job_id, code, message):
                await self._fail(worker, job_id, code, message)

    async def _perform_all(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Evict(device, key):
                    self.memory.evicted(self.workers[device].view, key, self.clock())
                    self.workers[device].supervisor.send(protocol.Evict(key))
                    self.workers[device].forget({key})
                case Start(job_id, device):
                    await self._start(self.backlog.start(job_id, self.clock()), self.workers[device])
                case Refuse(job_id):
                    dropped = self.backlog.drop(job_id)
                    refusal = scheduler.refusal(dropped.need, self.devices) if dropped else ""
                    error = error_of(DoesNotFit(f"The job {refusal}."))
                    self._done(await self._write(self.store.fail, job_id, error, self.clock()))

    # What the loop does

    async def _start(self, queued: Queued, worker: Worker) -> None:
        job = await self._write(self.store.start, queued.job_id, worker.supervisor.device.id, self.clock())
        if job is None:
            self.backlog.ended(queued, 0.0)
            return
        expect(worker, queued, self.clock())
        way = self.memory.orders(job.id, queued.need, worker.view)
        worker.status, worker.runs = "loading", queued
        worker.forget(queued.need.keys)
        worker.resident += queued.need.components
        output = self.files.path(job.output_name)
        worker.supervisor.send(
            protocol.Run(
                job.id, queued.weights, job.workflow, job.params, self.files.root.absolute(), output.absolute(), way
            )
        )

    async def _cancel(self, job_id: str) -> None:
        if self.backlog.drop(job_id):
            self._done(await self._write(self.store.cancel, job_id, self.clock()))
        if self.desk:
            self.desk.cancel(job_id)
        for worker in self.workers.values():
            if worker.runs and worker.runs.job_id == job_id:
                worker.supervisor.send(protocol.Cancel(job_id))

    async def _fail(self, worker: Worker, job_id: str, code: str, message: str) -> None:
        """A job that ran out of memory is tried in another way or place, as long as there is one."""
        if code == "OUT_OF_MEMORY" and worker.runs and (need := await self._next_try(worker, worker.runs)):
            worker.resident = ()
            await self._run_again(worker, need)
            worker.status = "idle"
            return
        if tried := self.memory.tried(job_id):
            message = f"{message} Tried: {'; '.join(tried)}."
        await self._end(worker, self.store.fail, job_id, {"error": message, "code": code}, self.clock())

    async def _next_try(self, worker: Worker, queued: Queued) -> Need | None:
        now, model = self.clock(), queued.job.model
        return await self._write(self.memory.ran_out, queued.job_id, model, queued.need, worker.view, self.devices, now)

    async def _learn(self, worker: Worker, peaks: Sequence[Peak]) -> None:
        """What the run took, for the jobs to come."""
        if worker.runs and peaks:
            job = worker.runs.job
            shape = shape_of(job.params, job.pixels)
            for row in await self._write(self.memory.learn, job.id, job.model, shape, peaks, self.clock()):
                self.memory.peaks.add(row)

    async def _show(self, worker: Worker, held: Sequence[Held]) -> None:
        """What the worker has, for whoever looks."""
        self.memory.held[worker.id] = tuple(held)
        await self._write(self.memory.write_device, worker.id, self.state(worker), self.clock())

    async def _mourn(self, worker: Worker, exit_code: int) -> None:
        """A worker is dead: its job runs again or fails, and another one is started, later after each death."""
        log.warning("worker of %s died with %s", worker.supervisor.device.id, exit_code)
        worker.status, worker.resident = "dead", ()
        await self._show(worker, ())
        await self._run_again(worker)
        delay_s = min(LONGEST_RESPAWN_DELAY_S, 2.0**worker.deaths - 1)
        worker.deaths += 1
        due = RespawnDue(worker.supervisor.device.id)
        asyncio.get_running_loop().call_later(delay_s, self.inbox.put_nowait, due)

    async def _run_again(self, worker: Worker, need: Need | None = None) -> None:
        """Because its worker died; or, with another `need`, because memory ran out, which is no attempt."""
        queued, worker.runs = worker.runs, None
        error, worker.hung = HUNG if worker.hung else INTERRUPTED, False
        if queued is None:
            return
        self.progress.pop(queued.job_id, None)
        job = await self._write(
            self.store.requeue, queued.job_id, self.clock(), count_attempt=need is None, error=error
        )
        if job and not job.is_final:
            again = replace(queued, need=need or queued.need, job=job)
            self.backlog.add_back(again)
        else:
            self.backlog.ended(queued, 0.0)
            self._done(job)

    async def _end(self, worker: Worker, write: Callable[..., Job | None], *values: Any) -> None:
        job = await self._write(write, *values)
        if worker.runs:
            self.backlog.ended(worker.runs, max(0.0, self.clock() - worker.started_at))
        worker.status, worker.runs, worker.deaths = "idle", None, 0
        self._done(job)

    def _done(self, job: Job | None) -> None:
        if job:
            self.progress.pop(job.id, None)
            self.memory.forget(job.id)
            self.watchers.tell(job.id, job)

    def _check_room(self, user_id: str) -> None:
        retry = {"Retry-After": str(self.backlog.retry_s(list(self.workers.values())))}
        if self.leaving:
            raise STOPPING
        if len(self.queue) + self.inbox.qsize() >= self.max_queued:
            raise QueueFull(f"The queue is full: {self.max_queued} jobs wait.", headers=retry)
        if self.backlog.turns.waiting(user_id) >= self.max_queued_each:
            limit = self.max_queued_each
            raise ConcurrencyLimit(f"You have {limit} jobs waiting; more cannot be taken.", headers=retry, limit=limit)

    async def _prioritise(self, job_id: str, priority: int) -> None:
        job = await self._write(self.store.prioritise, job_id, priority)
        if job and (queued := self.backlog.jobs.get(job_id)):
            self.backlog.put(replace(queued, priority=priority, job=job))

    async def _halt(self, what: str, on: bool) -> None:
        if on:
            await self._write(self.store.halt, what, self.clock())
            self.backlog.halted.add(what)
        else:
            await self._write(self.store.resume, what)
            self.backlog.halted.discard(what)
        if what in self.workers:
            self.workers[what].halted = on

    async def _learn_time(self, worker: Worker, run_s: float) -> None:
        """How long such jobs take, but for the weights that this one had to wait for."""
        if worker.runs:
            timing = self.backlog.learn(worker.runs, max(0.0, run_s - worker.load_s))
            await self._write(record_timing, self.store.db, timing)

    def _look_for_the_hung(self) -> None:
        """A worker whose job shows no sign of progress is killed; the rest follows from its death."""
        for worker in self.workers.values():
            worker.sign_at = min(worker.sign_at, self.clock())  # the clock may have been set back
            if worker.runs and not worker.hung and self.clock() - worker.sign_at > worker.hang_s:
                log.error("%s: job %s hangs", worker.id, worker.runs.job_id)
                worker.hung = True
                worker.supervisor.kill()

    def _tick(self) -> None:
        self.inbox.put_nowait(Tick())
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def _accept(self, new: NewJob, runnable: Runnable) -> tuple[Job, int]:
        now = self.clock()
        promised_at = self.backlog.promise(new, runnable, list(self.workers.values()), now)
        job, balance = await self.store.call(self.store.insert, new, now, promised_at)
        self.inbox.put_nowait(Submitted(self.backlog.queued(job, runnable)))
        return job, balance

    async def _accept_remote(self, new: NewJob) -> tuple[Job, int]:
        job, balance = await self.store.call(self.store.insert, new, self.clock())
        self.inbox.put_nowait(SubmittedRemote(job))
        return job, balance

    async def _take_up(self, job: Job) -> None:
        try:
            runnable = self.shelf.runnable(job.model, job.pixels, job.params)
        except PlantainError as gone:
            await self.store.call(self.store.fail, job.id, error_of(gone), self.clock())
        else:
            self.backlog.add(self.backlog.queued(job, runnable))

    async def _write(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Until it is written down: a full disk or a locked database holds the queue up, and loses nothing."""
        while True:
            try:
                result = await self.store.call(method, *args, **kwargs)
            except sqlite3.OperationalError as error:
                self.trouble = f"the database cannot be written: {error}"
                log.error("%s", self.trouble)
                await asyncio.sleep(STORE_RETRY_S)
            else:
                self.trouble = None
                return result

    def _fell(self, loop: asyncio.Task[None]) -> None:
        """A bug, since nothing else ends the loop: say so to whoever asks, and take the queue up at the next start."""
        if not loop.cancelled():
            self.trouble = f"the dispatcher fell: {loop.exception()!r}"
            log.critical("%s", self.trouble, exc_info=loop.exception())
            self.watchers.tell_all(InternalError("The server is in trouble; its log says why."))

    def _worker_said(self, device: str, event: protocol.Event) -> None:
        self.inbox.put_nowait(WorkerSaid(device, event))

    def _desk_said(self, said: errand.Said) -> None:
        self.inbox.put_nowait(DeskSaid(said))


def expect(worker: Worker, queued: Queued, now: float) -> None:
    """When the job that starts here should have ended, and when it hangs."""
    missing_bytes = worker.view.missing_bytes(queued.need)
    worker.load_s = missing_bytes / worker.link_bytes_per_s
    worker.started_at = worker.sign_at = now
    worker.ends_at = now + worker.load_s + queued.expected_s
    worker.hang_s = hang_s(queued.expected_s, missing_bytes)


def _answer(future: asyncio.Future[T], result: T) -> None:
    """Whoever asked may have been stopped meanwhile."""
    if not future.done():
        future.set_result(result)
