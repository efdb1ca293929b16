"""A job, from submit to end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.errors import PlantainError

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Origin = Literal["installed", "demo"]
"""Where the weights come from that a job is planned with, and runs with whatever is installed meanwhile."""
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
MAX_ATTEMPTS = 2
"""A job whose worker dies under it runs again once."""


@dataclass(frozen=True)
class IdempotencyClaim:
    """A caller's Idempotency-Key for the job to come. `replaces` is a job that had the key before and lost it."""

    route: str
    key: str
    body_hash: str
    replaces: str | None = None


@dataclass(frozen=True)
class NewJob:
    """A checked request: nothing about it is left to choose. `params` are camelCase JSON; images are file names.

    `at_once` is how many unfinished jobs the user may have with this one; `tops_up` grants what the balance lacks;
    `weight` is the user's share of busy devices. `overflow` is how the job may run at fal if no device here holds it,
    `{"endpoint": …, "params": …}`; None where it may not.
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
    """One row of the table. Instants are seconds since 1970; `output` and `error` are JSON or None."""

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
    """Who had a device from when to when: what fair shares are restored from."""

    job_id: str
    user_id: str
    weight: float
    created_at: float
    started_at: float
    finished_at: float


def error_of(error: PlantainError) -> dict[str, Any]:
    """What a failed job's row keeps of an error."""
    return {"error": error.message, "code": error.code, **error.extra}
