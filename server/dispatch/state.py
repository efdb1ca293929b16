"""Those who wait for the end of a job."""

import asyncio
from collections import defaultdict

from server.errors import PlantainError
from server.jobs.job import Job


class Waiters:
    """Futures by job. Whoever joins must leave, however the wait ends."""

    def __init__(self) -> None:
        self._futures: defaultdict[str, list[asyncio.Future[Job]]] = defaultdict(list)

    def join(self, job_id: str) -> asyncio.Future[Job]:
        future: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._futures[job_id].append(future)
        return future

    def leave(self, job_id: str, future: asyncio.Future[Job]) -> None:
        """Whoever waits no more, be it that their patience ended; the others of the job wait on."""
        if future in self._futures.get(job_id, ()):
            self._futures[job_id].remove(future)
            if not self._futures[job_id]:
                del self._futures[job_id]

    def tell(self, job_id: str, outcome: Job | PlantainError) -> None:
        for future in self._futures.pop(job_id, []):
            if future.done():
                continue
            if isinstance(outcome, Job):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def tell_all(self, error: PlantainError) -> None:
        for job_id in list(self._futures):
            self.tell(job_id, error)
