"""Messages that the dispatcher's run loop receives."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.base import Component, Weights
from server.jobs.job import Job
from server.remote.job import RemoteJobEvent
from server.scheduling.types import WaitingJob
from server.workers import protocol


@dataclass(frozen=True, kw_only=True)
class QueuedJob(WaitingJob):
    """A waiting or running job with all that a worker needs to run it."""

    job: Job
    weights: Weights
    loras: Mapping[str, Component] = field(default_factory=dict)


@dataclass(frozen=True)
class JobSubmitted:
    queued: QueuedJob


@dataclass(frozen=True)
class RemoteJobSubmitted:
    job: Job


@dataclass(frozen=True)
class CancelRequested:
    job_id: str
    done: asyncio.Future[None]


@dataclass(frozen=True)
class PriorityRequested:
    job_id: str
    priority: int
    done: asyncio.Future[None]


@dataclass(frozen=True)
class PauseRequested:
    """The whole queue or a device starts nothing (`paused`) until it is resumed."""

    what: str
    paused: bool
    done: asyncio.Future[None]


@dataclass(frozen=True)
class WorkerEvent:
    device: str
    event: protocol.Event


@dataclass(frozen=True)
class RemoteEvent:
    event: RemoteJobEvent


@dataclass(frozen=True)
class GpuMemoryReport:
    """What the driver calls free, by device."""

    free_bytes: Mapping[str, int]


@dataclass(frozen=True)
class RestartDue:
    """The back-off of a device whose worker crashed is over."""

    device: str


@dataclass(frozen=True)
class Tick:
    """A second has passed."""


Request = CancelRequested | PriorityRequested | PauseRequested
Message = JobSubmitted | RemoteJobSubmitted | Request | WorkerEvent | RemoteEvent | GpuMemoryReport | RestartDue | Tick
