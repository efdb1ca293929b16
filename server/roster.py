"""What the dispatcher keeps of each worker, and the messages that it is sent."""

import asyncio
from dataclasses import dataclass

from pipelines.base import Weights
from server import protocol, scheduler
from server.jobs import Job
from server.placement import LINK_BYTES_PER_S
from server.remote import errand
from server.scheduler import Waiting
from server.supervisor import Supervisor


@dataclass(frozen=True, kw_only=True)
class Queued(Waiting):
    """A waiting or running job with all that a worker must be told."""

    job: Job
    weights: Weights


@dataclass
class Worker:
    """What is known of one worker process."""

    supervisor: Supervisor
    budget_bytes: int
    resident: tuple[tuple[str, int], ...] = ()
    status: str = "starting"  # starting idle loading running dead
    runs: Queued | None = None
    deaths: int = 0  # in a row, with no job done between
    link_bytes_per_s: float = LINK_BYTES_PER_S

    @property
    def id(self) -> str:
        return self.supervisor.device.id

    @property
    def view(self) -> scheduler.Device:
        return scheduler.Device(
            self.id,
            self.budget_bytes,
            self.resident,
            idle=self.status == "idle",
            link_bytes_per_s=self.link_bytes_per_s,
            host_budget_bytes=self.supervisor.device.host_budget_bytes,
        )

    def forget(self, keys: set[str] | frozenset[str]) -> None:
        """These components are not resident any more."""
        self.resident = tuple(entry for entry in self.resident if entry[0] not in keys)


@dataclass(frozen=True)
class Submitted:
    queued: Queued


@dataclass(frozen=True)
class CancelAsked:
    job_id: str
    heard: asyncio.Future[None]


@dataclass(frozen=True)
class WorkerSaid:
    device: str
    event: protocol.Event


@dataclass(frozen=True)
class RespawnDue:
    device: str


@dataclass(frozen=True)
class SubmittedRemote:
    job: Job


@dataclass(frozen=True)
class DeskSaid:
    said: errand.Said


Message = Submitted | CancelAsked | WorkerSaid | RespawnDue | SubmittedRemote | DeskSaid
