"""A job as a row of the database: what is written of it, and what is read."""

import json
from typing import Any

from server.errors import PlantainError
from server.jobs import Job, NewJob
from server.turns import Ran
from server.vram import Need
from server.waiting import Waiting

INTERRUPTED = {"error": "The worker died twice while running this job.", "code": "GENERATION_FAILED"}
HUNG = {
    "error": "The job showed no progress for many times as long as it should take, twice.",
    "code": "GENERATION_TIMEOUT",
}
LOST_ON_THE_WAY = {
    "error": "The server died while it handed this job to fal.ai. It is not known to have arrived, and not sent twice.",
    "code": "REMOTE_SUBMIT_UNKNOWN",
}


def row_of(new: NewJob, now: float, promised_start_at: float | None) -> dict[str, Any]:
    return {
        "id": new.id,
        "user_id": new.user_id,
        "key_id": new.key_id,
        "kind": new.kind,
        "model": new.model,
        "workflow": new.workflow,
        "status": "queued",
        "params": json.dumps(new.params),
        "pixels": new.pixels,
        "output_name": new.output_name,
        "credits": new.credits,
        "created_at": now,
        "served_by": "fal" if new.remote_endpoint else None,
        "remote_endpoint": new.remote_endpoint,
        "overflow": json.dumps(new.overflow) if new.overflow else None,
        "weight": new.weight,
        "promised_start_at": promised_start_at,
        "weights": new.weights,
    }


def job_of(row: dict[str, Any]) -> Job:
    fields = {name: row[name] for name in Job.__dataclass_fields__}
    for name in ("params", "output", "error", "overflow"):
        fields[name] = json.loads(row[name]) if row[name] else None
    return Job(**fields)


def ran_of(row: dict[str, Any]) -> Ran:
    """Of the columns that the books of fairness read."""
    job = Waiting(row["id"], Need((), 0), row["user_id"], row["weight"], created_at=row["created_at"])
    return Ran(job, row["started_at"], row["finished_at"])


def error_of(error: PlantainError) -> dict[str, Any]:
    """What a failed job's row keeps of an error."""
    return {"error": error.message, "code": error.code, **error.extra}
