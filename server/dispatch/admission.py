"""Admission control: refuses a job before it is charged, or charges, stores and enqueues it."""

import asyncio

from server.dispatch.messages import JobSubmitted, Message, RemoteJobSubmitted
from server.dispatch.state import Effects, State
from server.errors import ConcurrencyLimit, DoesNotFit, QueueFull, Unavailable
from server.jobs.job import Job, NewJob
from server.model_registry import RunSpec
from server.scheduling.placement import refusal


class Admission:
    """`max_queued` jobs wait in all, and `max_queued_each` of one user."""

    def __init__(
        self, state: State, effects: Effects, inbox: asyncio.Queue[Message], max_queued: int, max_queued_each: int
    ) -> None:
        self.state, self.effects, self.inbox = state, effects, inbox
        self.max_queued, self.max_queued_each = max_queued, max_queued_each

    async def submit(self, new: NewJob, spec: RunSpec) -> tuple[Job, int]:
        """Returns the job and the balance left.

        Raises Unavailable, DoesNotFit, QueueFull, ConcurrencyLimit or InsufficientCredits.
        """
        if reason := refusal(spec.need, self.state.devices):
            raise DoesNotFit(f"{new.model} {reason}.", needBytes=spec.need.total_bytes)
        self._check_room(new.user_id)
        return await asyncio.shield(self._enqueue(new, spec))

    async def submit_remote(self, new: NewJob) -> tuple[Job, int]:
        """The same for a job that runs at fal.ai, where it waits in fal's own queue."""
        self._check_open()
        remote = self.effects.remote
        if remote and len(remote.tasks) + self.inbox.qsize() >= self.max_queued:
            jobs = [remote_job.job for remote_job in remote.errands.values()]
            retry_after_s = self.state.queue.remote_retry_after_s(jobs, self.effects.clock())
            raise self._queue_full(retry_after_s)
        return await asyncio.shield(self._enqueue_remote(new))

    def _check_open(self) -> None:
        if self.state.draining:
            raise stopping()

    def _check_room(self, user_id: str) -> None:
        self._check_open()
        retry_after_s = self.state.queue.retry_after_s(list(self.state.workers.values()))
        if len(self.state.queue.jobs) + self.inbox.qsize() >= self.max_queued:
            raise self._queue_full(retry_after_s)
        if self.state.queue.turns.waiting(user_id) >= self.max_queued_each:
            text = f"You have {self.max_queued_each} jobs waiting; more cannot be taken."
            raise ConcurrencyLimit(text, headers={"Retry-After": str(retry_after_s)}, limit=self.max_queued_each)

    def _queue_full(self, retry_after_s: int) -> QueueFull:
        headers = {"Retry-After": str(retry_after_s)}
        return QueueFull(f"The queue is full: {self.max_queued} jobs wait.", headers=headers)

    async def _enqueue(self, new: NewJob, spec: RunSpec) -> tuple[Job, int]:
        """The callers shield it: a request that breaks off in here leaves no job charged but not queued."""
        job, balance = await self.effects.database.call(self.effects.jobs.insert, new, self.effects.clock())
        self.inbox.put_nowait(JobSubmitted(self.state.queue.queued(job, spec)))
        return job, balance

    async def _enqueue_remote(self, new: NewJob) -> tuple[Job, int]:
        job, balance = await self.effects.database.call(self.effects.jobs.insert, new, self.effects.clock())
        self.inbox.put_nowait(RemoteJobSubmitted(job))
        return job, balance


def stopping() -> Unavailable:
    return Unavailable("The server is stopping; the job goes on when it is back.")
