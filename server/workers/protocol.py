"""What the server and a worker say to each other. Paths cross the pipe, never pixels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.base import Component, ComponentStatus, ExecutionMode, Peak, Weights

# Commands: server → worker


@dataclass(frozen=True)
class Run:
    """Run `params` (camelCase JSON of the workflow's class) with `weights`, in this `way`; write to `output`.

    `loras` are the files of those that `params` name, by their ids.
    """

    job_id: str
    weights: Weights
    workflow: str
    params: Mapping[str, Any]
    files: Path
    output: Path
    way: ExecutionMode = field(default_factory=ExecutionMode)
    loras: Mapping[str, Component] = field(default_factory=dict)


@dataclass(frozen=True)
class Evict:
    """Unload one component."""

    key: str


@dataclass(frozen=True)
class Prefetch:
    """While another job runs, bring components of a waiting one: to the device, or into host memory only.

    In place of what a command before this one has not begun to bring. It is answered by one `Prefetched`.
    """

    job_id: str
    weights: Weights
    to_device: tuple[str, ...]
    to_host: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Stop this job at the next step boundary; nothing happens if it no longer runs."""

    job_id: str


@dataclass(frozen=True)
class Shutdown:
    """End after the running job."""


Command = Run | Evict | Prefetch | Cancel | Shutdown

# Events: worker → server


@dataclass(frozen=True)
class Ready:
    """The worker takes commands. The link is that from host memory; None where the host is the device."""

    link_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Progress:
    job_id: str
    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class Resident:
    """What is on the device now: (component key, bytes), least recently used first. A fact, not a wish.

    `held` tells more of each, and of the copies in host memory.
    """

    components: tuple[tuple[str, int], ...]
    held: tuple[ComponentStatus, ...] = ()


@dataclass(frozen=True)
class Prefetched:
    """A `Prefetch` has ended; `Resident` has told what came of it. `failure` is for the operator, empty if all came."""

    job_id: str
    failure: str = ""


@dataclass(frozen=True)
class Succeeded:
    """The output lies where `Run.output` said. `duration_s` is a video's. `peaks` are what was measured, by phase."""

    job_id: str
    width: int
    height: int
    run_s: float
    duration_s: float | None = None
    peaks: tuple[Peak, ...] = ()


@dataclass(frozen=True)
class Failed:
    """`message` is for the caller; what is for the operator went to the log."""

    job_id: str
    code: str
    message: str


@dataclass(frozen=True)
class Cancelled:
    job_id: str


@dataclass(frozen=True)
class Died:
    """Said by the supervisor, not by the worker: the process is gone."""

    exit_code: int


Event = Ready | Progress | Resident | Prefetched | Succeeded | Failed | Cancelled | Died
