"""Where jobs come in: refused before they are charged, or charged, written down, and sent to the dispatcher."""

import asyncio
from collections.abc import Callable

from server.dispatch.actions import Floor
from server.dispatch.messages import JobSubmitted, Message, RemoteJobSubmitted
from server.errors import ConcurrencyLimit, DoesNotFit, QueueFull, Unavailable
from server.jobs.job import Job, NewJob
from server.model_registry import RunSpec
from server.remote.runner import RemoteRunner
from server.scheduling import placement


class Admission:
    """`max_queued_each` is of one user. Once `closed`, nothing comes in any more."""

    def __init__(
        self,
        floor: Floor,
        desk: RemoteRunner | None,
        inbox: asyncio.Queue[Message],
        clock: Callable[[], float],
        max_queued: int,
        max_queued_each: int,
    ) -> None:
        self.floor, self.desk, self.inbox, self.clock = floor, desk, inbox, clock
        self.backlog, self.store = floor.backlog, floor.store
        self.max_queued, self.max_queued_each = max_queued, max_queued_each
        self.closed = False

    async def submit(self, new: NewJob, runnable: RunSpec) -> tuple[Job, int]:
        """Charge and queue; returns the job and the balance left. Raises DoesNotFit, QueueFull, InsufficientCredits."""
        if refusal := placement.refusal(runnable.need, self.floor.devices):
            raise DoesNotFit(f"{new.model} {refusal}.", needBytes=runnable.need.total_bytes)
        self._check_room(new.user_id)
        return await asyncio.shield(self._accept(new, runnable))

    async def submit_remote(self, new: NewJob) -> tuple[Job, int]:
        """The same for a job that runs at fal, where it waits in fal's own queue."""
        if self.closed:
            raise stopping()
        if self.desk and len(self.desk.tasks) + self.inbox.qsize() >= self.max_queued:
            jobs = [errand.job for errand in self.desk.errands.values()]
            headers = {"Retry-After": str(self.backlog.retry_remote_s(jobs, self.clock()))}
            raise QueueFull(f"The queue is full: {self.max_queued} jobs wait.", headers=headers)
        return await asyncio.shield(self._accept_remote(new))

    def _check_room(self, user_id: str) -> None:
        if self.closed:
            raise stopping()
        if len(self.backlog.jobs) + self.inbox.qsize() >= self.max_queued:
            raise QueueFull(f"The queue is full: {self.max_queued} jobs wait.", headers=self._retry_after())
        if self.backlog.turns.waiting(user_id) >= self.max_queued_each:
            text = f"You have {self.max_queued_each} jobs waiting; more cannot be taken."
            raise ConcurrencyLimit(text, headers=self._retry_after(), limit=self.max_queued_each)

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self.backlog.retry_s(list(self.floor.workers.values())))}

    async def _accept(self, new: NewJob, runnable: RunSpec) -> tuple[Job, int]:
        now = self.clock()
        promised_at = self.backlog.promise(new, runnable, list(self.floor.workers.values()), now)
        job, balance = await self.store.database.call(self.store.insert, new, now, promised_at)
        self.inbox.put_nowait(JobSubmitted(self.backlog.queued(job, runnable)))
        return job, balance

    async def _accept_remote(self, new: NewJob) -> tuple[Job, int]:
        job, balance = await self.store.database.call(self.store.insert, new, self.clock())
        self.inbox.put_nowait(RemoteJobSubmitted(job))
        return job, balance


def stopping() -> Unavailable:
    return Unavailable("The server is stopping; the job goes on when it is back.")
