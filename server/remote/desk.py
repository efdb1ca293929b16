"""The jobs that run at fal, a task for each. What comes of them is told to the dispatcher, as workers tell it."""

import asyncio
import logging
from collections.abc import Callable

from pipelines.catalog import Catalog, UnknownModel
from server.errors import InternalError, JobWasCancelled, ModelNotFound, PlantainError, RemoteUnavailable
from server.jobs import Job
from server.protocol import Cancelled
from server.remote.collect import Collector
from server.remote.errand import Broken, Errand, Finished, Said, Timing
from server.remote.queue import Request
from server.remote.storage import Storage

log = logging.getLogger("plantain.remote")

Clock = Callable[[], float]

HAND_OVER_PATIENCE_S = 20.0


class Desk:
    """`storage` is None where nothing can be sent to fal, and `why_not` says why."""

    def __init__(
        self,
        catalog: Catalog,
        collector: Collector,
        storage: Storage | None,
        timing: Timing,
        clock: Clock,
        why_not: str = "",
    ) -> None:
        self.catalog, self.collector, self.storage, self.why_not = catalog, collector, storage, why_not
        self.timing, self.clock = timing, clock
        self.tell: Callable[[Said], None] = lambda said: None
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.errands: dict[str, Errand] = {}
        self.stopped = False

    @property
    def connected(self) -> bool:
        return self.storage is not None

    def check(self) -> Storage:
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
            return self.tell(Broken(job.id, error))
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
            await asyncio.wait(handing, timeout=HAND_OVER_PATIENCE_S)
        for late in handing:
            late.cancel()
        await asyncio.gather(*handing, *self.tasks.values(), return_exceptions=True)
        if self.storage:
            await self.storage.close()

    def _errand(self, job: Job) -> Errand:
        storage = self.check()
        try:
            model = self.catalog.find(job.model)
        except UnknownModel as unknown:
            raise ModelNotFound(f"{unknown} It was taken out of the catalogue.", model=job.model) from unknown
        endpoint = self.catalog.endpoint(job.remote_endpoint or "")
        request = Request(storage.connection, model, endpoint, job.remote_request_id or "")
        return Errand(job, request, storage, self.collector, self.timing, self.clock, self.tell)

    async def _serve(self, job_id: str, errand: Errand) -> None:
        """Run one job to what ends it."""
        try:
            self.tell(Finished(job_id, await errand.run()))
        except JobWasCancelled:
            self.tell(Cancelled(job_id))
        except PlantainError as error:
            log.warning("job %s: %s: %s", job_id, error.code, error.message)
            self.tell(Broken(job_id, error))
        except Exception as error:
            log.error("job %s", job_id, exc_info=error)
            self.tell(Broken(job_id, InternalError("Something went wrong here; the server's log says what.")))
        del self.tasks[job_id], self.errands[job_id]
