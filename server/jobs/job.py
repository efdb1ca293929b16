"""A job: its request, its row and its states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.errors import PlantainError

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Origin = Literal["installed", "demo"]
"""The weights that a job was planned with. It runs with these, also if others are installed later."""
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
MAX_ATTEMPTS = 2
"""A job whose worker process exits while it runs is run once more."""


@dataclass(frozen=True)
class IdempotencyClaim:
    """An Idempotency-Key for a new job. `replaces` is the job that it stood for before, whose failure is retried."""

    route: str
    key: str
    body_hash: str
    replaces: str | None = None


@dataclass(frozen=True)
class NewJob:
    """A validated request, complete: nothing is left to choose. `params` are camelCase JSON; images are file names.

    `max_concurrent_jobs` is the plan's limit of unfinished jobs, this one included; `auto_top_up` grants what the
    balance lacks; `weight` is the user's share of busy devices. `remote_fallback` is how the job may run at fal if no
    local device has enough memory, `{"endpoint": …, "params": …}`; None if it may not.
    """

    id: str
    user_id: str
    key_id: str | None
    kind: str
    model: str
    workflow: str
    params: Mapping[str, Any]
    pixels: int
    output_name: str
    credits: int
    input_names: tuple[str, ...] = ()
    max_concurrent_jobs: int | None = None
    auto_top_up: bool = False
    idempotency: IdempotencyClaim | None = None
    ignored: tuple[str, ...] = ()
    remote_endpoint: str | None = None
    remote_fallback: Mapping[str, Any] | None = None
    weight: float = 1.0
    weights: Origin | None = None


@dataclass(frozen=True)
class Job:
    """A row of the table `job`. Instants are seconds since 1970; `output` and `error` are JSON or None."""

    id: str
    user_id: str
    key_id: str | None
    kind: str
    model: str
    workflow: str
    status: Status
    params: Mapping[str, Any]
    pixels: int
    output_name: str
    credits: int
    attempts: int
    device: str | None
    served_by: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    output: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    remote_endpoint: str | None = None
    remote_request_id: str | None = None
    priority: int = 0
    weight: float = 1.0
    predicted_start_at: float | None = None
    remote_fallback: Mapping[str, Any] | None = None
    weights: Origin | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


@dataclass(frozen=True)
class FinishedRun:
    """A run on a local device, from which fair shares are restored at start."""

    job_id: str
    user_id: str
    weight: float
    created_at: float
    started_at: float
    finished_at: float


def error_of(error: PlantainError) -> dict[str, Any]:
    """The JSON of an error in a failed job's row."""
    return {"error": error.message, "code": error.code, **error.extra}
