"""The dispatcher's state, and what its handlers may do to the world outside."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from server.db.database import Database
from server.dispatch.memory import MemoryTracker
from server.dispatch.queue import JobQueue
from server.dispatch.worker_state import WorkerState
from server.errors import PlantainError
from server.files.store import FileStore
from server.jobs.job import Job
from server.jobs.store import JobStore
from server.remote.runner import RemoteRunner
from server.scheduling.types import DeviceState
from server.workers import protocol


class Waiters:
    """Futures of callers that wait for the end of a job, by job."""

    def __init__(self) -> None:
        self._futures: defaultdict[str, list[asyncio.Future[Job]]] = defaultdict(list)

    def add(self, job_id: str) -> asyncio.Future[Job]:
        """The caller must `remove` it, however the wait ends."""
        future: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._futures[job_id].append(future)
        return future

    def remove(self, job_id: str, future: asyncio.Future[Job]) -> None:
        if future in self._futures.get(job_id, ()):
            self._futures[job_id].remove(future)
            if not self._futures[job_id]:
                del self._futures[job_id]

    def notify(self, job_id: str, outcome: Job | PlantainError) -> None:
        for future in self._futures.pop(job_id, []):
            if future.done():
                continue
            if isinstance(outcome, Job):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def fail_all(self, error: PlantainError) -> None:
        for job_id in list(self._futures):
            self.notify(job_id, error)


@dataclass
class State:
    """Everything that the run loop owns. Only its task changes it."""

    queue: JobQueue
    workers: dict[str, WorkerState]
    memory: MemoryTracker
    progress: dict[str, protocol.Progress] = field(default_factory=dict)
    waiters: Waiters = field(default_factory=Waiters)
    draining: bool = False
    """The server is stopping: nothing starts, nothing is accepted."""

    @property
    def devices(self) -> list[DeviceState]:
        return self.queue.device_states(self.workers.values())

    @property
    def drained(self) -> bool:
        return self.draining and not any(worker.job for worker in self.workers.values())

    def begin_drain(self) -> None:
        self.draining = True


@dataclass(frozen=True)
class Effects:
    """What handlers may do to the world outside."""

    database: Database
    jobs: JobStore
    files: FileStore
    remote: RemoteRunner | None
    clock: Callable[[], float]
    restart_later: Callable[[str, float], None]
    """Start a device's worker again after so many seconds."""
