"""The dispatcher's run loop: it takes what has come, then decides once. Meanwhile nothing else changes the state."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from server.floor import Floor
from server.remote.desk import Desk
from server.remote.news import hear
from server.roster import (
    CancelAsked,
    DeskSaid,
    DriverSaid,
    HaltAsked,
    Message,
    PriorityAsked,
    RespawnDue,
    Submitted,
    SubmittedRemote,
    Tick,
    WorkerSaid,
)
from server.scribe import Scribe


class Loop:
    """Once it is `leaving` it starts nothing more, and is `quiet` when nothing runs any more."""

    def __init__(
        self,
        inbox: asyncio.Queue[Message],
        scribe: Scribe,
        floor: Floor,
        desk: Desk | None,
        clock: Callable[[], float],
    ) -> None:
        self.inbox, self.scribe, self.floor, self.desk, self.clock = inbox, scribe, floor, desk, clock
        self.store, self.backlog = scribe.store, floor.backlog
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
                self.floor.kill_the_hung()
            case DriverSaid(free_bytes):
                await self.floor.hear_driver(free_bytes)
            case WorkerSaid(device, event):
                await self.floor.hear(self.workers[device], event)
            case RespawnDue(device):
                self.floor.spawn(self.workers[device])
            case SubmittedRemote(job) if self.desk:
                self.desk.start(job)
            case DeskSaid(said):
                await hear(said, self.scribe, self.endings, self.clock())

    async def _cancel(self, job_id: str) -> None:
        if self.backlog.drop(job_id):
            self.endings.done(await self.scribe.write(self.store.cancel, job_id, self.clock()))
        if self.desk:
            self.desk.cancel(job_id)
        self.floor.cancel(job_id)

    async def _prioritise(self, job_id: str, priority: int) -> None:
        job = await self.scribe.write(self.store.prioritise, job_id, priority)
        if job and (queued := self.backlog.jobs.get(job_id)):
            self.backlog.put(replace(queued, priority=priority, job=job))

    async def _halt(self, what: str, on: bool) -> None:
        if on:
            await self.scribe.write(self.store.halt, what, self.clock())
            self.backlog.halted.add(what)
        else:
            await self.scribe.write(self.store.resume, what)
            self.backlog.halted.discard(what)
        if what in self.workers:
            self.workers[what].halted = on
