"""Runs fal.ai jobs, one task for each, and reports their events to the dispatcher."""

import asyncio
import logging
from collections.abc import Callable

import httpx

from pipelines.catalog.catalog import Catalog, UnknownModel
from server.errors import InternalError, JobWasCancelled, ModelNotFound, PlantainError, RemoteUnavailable
from server.files.fetch import AddressGuard
from server.files.store import FileStore
from server.jobs.job import Job
from server.remote.client import Connection, Request
from server.remote.job import RemoteJob, RemoteJobEvent, RemoteJobFailed, RemoteSucceeded, RemoteTimeouts
from server.remote.results import ResultDownloader
from server.remote.uploads import InputUploader
from server.settings import Settings
from server.workers.protocol import Cancelled

log = logging.getLogger("plantain.remote")
Clock = Callable[[], float]

SUBMIT_GRACE_S = 20.0


class RemoteRunner:
    """`storage` is None where nothing can be sent to fal, and `why_not` says why."""

    def __init__(
        self,
        catalog: Catalog,
        collector: ResultDownloader,
        storage: InputUploader | None,
        timing: RemoteTimeouts,
        clock: Clock,
        emit: Callable[[RemoteJobEvent], None],
        why_not: str = "",
    ) -> None:
        self.catalog, self.collector, self.storage, self.why_not = catalog, collector, storage, why_not
        self.timing, self.clock = timing, clock
        self.emit = emit
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.errands: dict[str, RemoteJob] = {}
        self.stopped = False

    @property
    def connected(self) -> bool:
        return self.storage is not None

    def check(self) -> InputUploader:
        """Raises RemoteUnavailable if nothing can be sent to fal."""
        if self.storage is None:
            raise RemoteUnavailable(f"This runs on fal.ai, and {self.why_not}")
        return self.storage

    def start(self, job: Job) -> None:
        """Hand the job over, or go on with it where a server before this one left it; not while the server ends."""
        if self.stopped:
            return None
        try:
            errand = self._errand(job)
        except PlantainError as error:
            return self.emit(RemoteJobFailed(job.id, error))
        self.errands[job.id] = errand
        self.tasks[job.id] = asyncio.create_task(self._serve(job.id, errand), name=f"remote {job.id}")
        return None

    def cancel(self, job_id: str) -> None:
        if job_id in self.errands:
            self.errands[job_id].cancel.set()

    async def stop(self) -> None:
        """Let go of the jobs, which go on at the next start; but a request being sent is brought to its id first."""
        self.stopped = True
        for task in self.tasks.values():
            task.cancel()
        handing = [each.handing for each in self.errands.values() if each.handing]
        if handing:
            await asyncio.wait(handing, timeout=SUBMIT_GRACE_S)
        for late in handing:
            late.cancel()
        await asyncio.gather(*handing, *self.tasks.values(), return_exceptions=True)
        if self.storage:
            await self.storage.close()

    def _errand(self, job: Job) -> RemoteJob:
        storage = self.check()
        try:
            model = self.catalog.find(job.model)
        except UnknownModel as unknown:
            raise ModelNotFound(f"{unknown} It was taken out of the catalogue.", model=job.model) from unknown
        endpoint = self.catalog.endpoint(job.remote_endpoint or "")
        request = Request(storage.connection, model, endpoint, job.remote_request_id or "")
        return RemoteJob(job, request, storage, self.collector, self.timing, self.clock, self.emit)

    async def _serve(self, job_id: str, errand: RemoteJob) -> None:
        """Run one job to what ends it."""
        try:
            self.emit(RemoteSucceeded(job_id, await errand.run()))
        except JobWasCancelled:
            self.emit(Cancelled(job_id))
        except PlantainError as error:
            log.warning("job %s: %s: %s", job_id, error.code, error.message)
            self.emit(RemoteJobFailed(job_id, error))
        except Exception as error:
            log.error("job %s", job_id, exc_info=error)
            self.emit(RemoteJobFailed(job_id, InternalError("Something went wrong here; the server's log says what.")))
        del self.tasks[job_id], self.errands[job_id]


NO_KEY = "no key for it is set. The operator's is read from FAL_KEY."
OFFLINE = "this server is offline."
LOCAL_ONLY = "this server runs everything itself."


def build_remote(
    settings: Settings,
    catalog: Catalog,
    files: FileStore,
    clock: Clock,
    emit: Callable[[RemoteJobEvent], None],
    timing: RemoteTimeouts | None = None,
) -> RemoteRunner:
    """Without a key, or where the operator forbids it, nothing is ever sent."""
    guard = AddressGuard(settings.allowed_networks)
    timing = timing or RemoteTimeouts(deadline_s=settings.remote_deadline_s)
    tls = httpx.create_ssl_context()
    collector = ResultDownloader(files, guard, tls, settings.pass_through_urls, timing.retry_s)
    if trouble := unavailable_reason(settings):
        return RemoteRunner(catalog, collector, None, timing, clock, emit, trouble)
    connection = Connection.open(settings.fal_key or "", settings.fal_queue_url, settings.fal_rest_url, tls)
    return RemoteRunner(catalog, collector, InputUploader(connection, guard, tls), timing, clock, emit)


def unavailable_reason(settings: Settings) -> str:
    """Why nothing can be sent to fal; empty if it can."""
    if settings.offline:
        return OFFLINE
    if settings.route == "local-only":
        return LOCAL_ONLY
    return "" if settings.fal_key else NO_KEY
