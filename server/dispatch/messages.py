"""What the dispatcher keeps of each worker, and the messages that it is sent."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.base import Component, Weights
from server.jobs.job import Job
from server.remote import job
from server.scheduling.types import WaitingJob
from server.workers import protocol


@dataclass(frozen=True, kw_only=True)
class QueuedJob(WaitingJob):
    """A waiting or running job with all that a worker must be told."""

    job: Job
    weights: Weights
    loras: Mapping[str, Component] = field(default_factory=dict)


@dataclass(frozen=True)
class JobSubmitted:
    queued: QueuedJob


@dataclass(frozen=True)
class CancelRequested:
    job_id: str
    heard: asyncio.Future[None]


@dataclass(frozen=True)
class WorkerEvent:
    device: str
    event: protocol.Event


@dataclass(frozen=True)
class RestartDue:
    device: str


@dataclass(frozen=True)
class RemoteJobSubmitted:
    job: Job


@dataclass(frozen=True)
class RemoteEvent:
    said: job.RemoteJobEvent


@dataclass(frozen=True)
class PriorityRequested:
    job_id: str
    priority: int
    heard: asyncio.Future[None]


@dataclass(frozen=True)
class PauseRequested:
    """`what` is the queue or a device: to start nothing until resumed."""

    what: str
    on: bool
    heard: asyncio.Future[None]


@dataclass(frozen=True)
class GpuMemoryReport:
    """By device, what its driver calls free."""

    free_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Reply = CancelRequested | PriorityRequested | PauseRequested
Message = JobSubmitted | RemoteJobSubmitted | Reply | WorkerEvent | RemoteEvent | GpuMemoryReport | RestartDue | Tick
