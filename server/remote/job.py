"""One job's way through fal: files up, handed over once, followed with a deadline, its output brought home."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx

from server.errors import GenerationTimeout, JobWasCancelled, PlantainError
from server.jobs.job import Job
from server.remote.arguments import arguments
from server.remote.client import Request, Status
from server.remote.errors import RemoteBusy, RemoteUnreachable
from server.remote.results import RemoteOutput, ResultDownloader
from server.remote.uploads import InputUploader
from server.workers.protocol import Cancelled, Progress

log = logging.getLogger("plantain.remote")
T = TypeVar("T")

NOT_SENT_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
MAX_RETRY_DELAY_S = 30.0


@dataclass(frozen=True)
class RemoteTimeouts:
    """How often to look, how long to try again where fal is busy or away, and how long a job may take in all."""

    poll_s: float = 1.0
    retry_s: float = 1.0
    submit_s: float = 60.0
    deadline_s: float = 1800.0


# What is told. A future is answered once it is written down.


@dataclass(frozen=True)
class SubmitStarted:
    """The request is about to be sent. Answered with the running job, or None if it is queued no more."""

    job_id: str
    written: asyncio.Future[Job | None]


@dataclass(frozen=True)
class Submitted:
    job_id: str
    request_id: str
    written: asyncio.Future[None]


@dataclass(frozen=True)
class RemoteSucceeded:
    """The output lies in the folder of files."""

    job_id: str
    collected: RemoteOutput


@dataclass(frozen=True)
class RemoteJobFailed:
    job_id: str
    error: PlantainError


RemoteJobEvent = SubmitStarted | Submitted | RemoteSucceeded | RemoteJobFailed | Progress | Cancelled
Tell = Callable[[RemoteJobEvent], None]


class RemoteJob:
    """`cancel` is set when somebody asks for the job's end; `handing` is the hand-over, once it has begun."""

    def __init__(
        self,
        job: Job,
        request: Request,
        storage: InputUploader,
        collector: ResultDownloader,
        timing: RemoteTimeouts,
        clock: Any,
        tell: Tell,
    ) -> None:
        self.job, self.request, self.storage, self.collector = job, request, storage, collector
        self.timing, self.clock, self.tell = timing, clock, tell
        self.deadline_at = (job.started_at or clock()) + timing.deadline_s
        self.cancel = asyncio.Event()
        self.handing: asyncio.Task[str] | None = None

    async def run(self) -> RemoteOutput:
        """Raises JobWasCancelled, GenerationTimeout, or what fal refuses with."""
        if not self.request.id:
            self.request = replace(self.request, id=await self._hand_over())
        await self._follow()
        return await self.collector.collect(self.job, await self._patiently(self.request.result))

    # Handing over

    async def _hand_over(self) -> str:
        """Whole, even while the server stops: what fal took must be known by its id."""
        body = await self._body()
        if self.cancel.is_set():
            raise JobWasCancelled("The job was cancelled.")
        self.handing = asyncio.create_task(self._submit(body))
        return await asyncio.shield(self.handing)

    async def _body(self) -> dict[str, Any]:
        """What is sent, once fal can read the input files."""
        params, endpoint = self.job.params, self.request.endpoint
        names = [*params.get("images", ()), *(params[key] for key in ("video", "audio") if key in params)]
        files = self.collector.files
        urls = {name: await self.storage.url(files.path(name), endpoint.data_urls) for name in names}
        return arguments(endpoint, params, urls.__getitem__)

    async def _submit(self, body: dict[str, Any]) -> str:
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[Job | None] = loop.create_future()
        self.tell(SubmitStarted(self.job.id, begun))
        if await begun is None:
            raise JobWasCancelled("The job was cancelled.")
        request_id = await self._send(body)
        known: asyncio.Future[None] = loop.create_future()
        self.tell(Submitted(self.job.id, request_id, known))
        await known
        return request_id

    async def _send(self, body: dict[str, Any]) -> str:
        """Again only where fal certainly did not take it: it said that it was busy, or was never reached."""
        end_at, wait_s = self.clock() + self.timing.submit_s, self.timing.retry_s
        while True:
            try:
                return await self.request.submit(body)
            except (RemoteBusy, RemoteUnreachable) as error:
                maybe_taken = isinstance(error, RemoteUnreachable) and not isinstance(error.__cause__, NOT_SENT_ERRORS)
                if maybe_taken or self.clock() + wait_s > end_at:
                    raise
            if await self._cancel_asked(wait_s):
                raise JobWasCancelled("The job was cancelled.")
            wait_s = min(2 * wait_s, MAX_RETRY_DELAY_S)

    # Following

    async def _follow(self) -> None:
        """Until fal is done with it, whatever came of it."""
        before = None
        while (status := await self._patiently(self.request.status)).state != "done":
            if status != before:
                self.tell(_progress(self.job.id, status))
            before = status
            if self.clock() > self.deadline_at:
                await self._cancel()
                raise GenerationTimeout(f"fal.ai did not finish within {self.timing.deadline_s:g} s.")
            if await self._cancel_asked(self.timing.poll_s) and await self._cancel():
                raise JobWasCancelled("The job was cancelled.")

    async def _cancel_asked(self, within_s: float) -> bool:
        """Waits so long, or until somebody asks for the job's end; each asking is told once."""
        try:
            await asyncio.wait_for(self.cancel.wait(), within_s)
        except TimeoutError:
            return False
        self.cancel.clear()
        return True

    async def _cancel(self) -> bool:
        """False if it was too late. A fal that cannot be told is left to itself: the job ends here all the same."""
        try:
            return await self.request.cancel()
        except PlantainError as error:
            log.warning("fal.ai was not told to cancel %s: %s", self.request.id, error.message)
            return True

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again while fal is away or busy: the job is paid for."""
        wait_s = self.timing.retry_s
        while True:
            try:
                return await ask()
            except (RemoteBusy, RemoteUnreachable):
                if self.clock() + wait_s > self.deadline_at:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_RETRY_DELAY_S)


def _progress(job_id: str, status: Status) -> Progress:
    """In fal's queue `step` is how many requests are before this one."""
    if status.state == "queued":
        return Progress(job_id, "queued at fal", status.position, 0)
    return Progress(job_id, "running at fal", status.step, status.steps)
