"""The tries that ran out of memory, and what each device last said of itself: rows in the database."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from pipelines.base import TIERS, ExecutionMode, Peak
from server.scheduling.estimates import DurationEstimate, PeakMeasurement
from server.scheduling.need import Shape
from server.scheduling.placement import Attempt


def record_peaks(
    db: Database, model: str, way: ExecutionMode, shape: Shape, device_kind: str, peaks: Iterable[Peak], now: float
) -> list[PeakMeasurement]:
    """Of each phase the largest peak stays. Returns the rows as they are then."""
    rows = []
    for peak in peaks:
        rows += db.query(
            RECORD,
            {
                "model": model,
                "tier": way.tier,
                "tiled": int(way.tiled),
                "phase": peak.phase,
                "pixels": shape.pixels,
                "frames": shape.frames,
                "device_kind": device_kind,
                "working_bytes": peak.working_bytes,
                "allocated_bytes": peak.allocated_bytes,
                "now": now,
            },
        )
    return [measured_of(row) for row in rows]


def read_peaks(db: Database) -> list[PeakMeasurement]:
    return [measured_of(row) for row in db.query("SELECT * FROM peak ORDER BY model, phase, pixels, frames")]


def measured_of(row: Mapping[str, Any]) -> PeakMeasurement:
    fields = {name: row[name] for name in PeakMeasurement.__dataclass_fields__ if name != "way"}
    return PeakMeasurement(way=ExecutionMode(row["tier"], bool(row["tiled"])), **fields)


RECORD = """
INSERT INTO peak (model, tier, tiled, phase, pixels, frames, device_kind, working_bytes, allocated_bytes, measured_at)
VALUES (:model, :tier, :tiled, :phase, :pixels, :frames, :device_kind, :working_bytes, :allocated_bytes, :now)
ON CONFLICT (model, tier, tiled, phase, pixels, frames, device_kind) DO UPDATE SET
    working_bytes = max(working_bytes, excluded.working_bytes),
    allocated_bytes = max(allocated_bytes, excluded.allocated_bytes),
    measured_at = excluded.measured_at
RETURNING *
"""


def read_timings(db: Database) -> list[DurationEstimate]:
    return [DurationEstimate(**row) for row in db.query("SELECT * FROM timing")]


def record_timing(db: Database, timing: DurationEstimate) -> None:
    db.table("timing").upsert(
        {
            "model": timing.model,
            "workflow": timing.workflow,
            "work": timing.work,
            "run_s": timing.run_s,
            "runs": timing.runs,
        },
        pk=("model", "workflow", "work"),
    )


FAL = "fal"
"""What `next_device` is of a job's last try here, where it goes to fal then."""


def record_attempt(
    db: Database,
    job_id: str,
    model: str,
    failed: Attempt,
    following: Attempt | None,
    now: float,
    *,
    budget_bytes: int,
    remote_next: bool = False,
) -> None:
    """A try ran out of memory, on a device of this budget; `following` is the next one here, None if there is none."""
    db.table("rung").insert(
        {
            "job_id": job_id,
            "model": model,
            "device": failed.device,
            "way": failed.way.name,
            "next_device": following.device if following else FAL if remote_next else None,
            "next_way": following.way.name if following else None,
            "failed_at": now,
            "budget_bytes": budget_bytes,
        }
    )


def read_attempts(db: Database, device: str | None = None, limit: int = 20) -> list[dict[str, Any]]:
    """The last ones, newest first."""
    return list(
        db.query(
            "SELECT * FROM rung WHERE :device IS NULL OR device = :device ORDER BY id DESC LIMIT :limit",
            {"device": device, "limit": limit},
        )
    )


@dataclass(frozen=True)
class FailedMode:
    """A way that a job ran out of memory in, with this budget, before it ended well on the same device in another."""

    job_id: str
    way: ExecutionMode
    budget_bytes: int


def read_failed_modes(db: Database, since: float) -> list[FailedMode]:
    """Oldest first. A job that ended at fal tells nothing of the device."""
    rows = db.query(FAILED_MODES, {"since": since})
    return [FailedMode(row["job_id"], mode_named(row["way"]), row["budget_bytes"]) for row in rows]


def mode_named(name: str) -> ExecutionMode:
    """`staged, tiled` -> the way that has this name."""
    return next(
        ExecutionMode(tier, tiled)
        for tier in TIERS
        for tiled in (False, True)
        if ExecutionMode(tier, tiled).name == name
    )


FAILED_MODES = """
SELECT rung.job_id, rung.way, rung.budget_bytes FROM rung JOIN job ON job.id = rung.job_id
WHERE rung.failed_at > :since AND rung.budget_bytes IS NOT NULL
    AND job.status = 'succeeded' AND job.served_by = 'local' AND job.device = rung.device
    AND rung.way IS NOT (SELECT next_way FROM rung AS last WHERE last.job_id = rung.job_id ORDER BY id DESC LIMIT 1)
ORDER BY rung.id
"""


def record_device(db: Database, device: str, state: Mapping[str, Any], now: float) -> None:
    """What `plantain devices` shows: the state as the server last saw it."""
    db.execute(
        "INSERT INTO device (id, state, seen_at) VALUES (?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET state = excluded.state, seen_at = excluded.seen_at",
        [device, json.dumps(state), now],
    )


def read_devices(db: Database) -> list[dict[str, Any]]:
    rows = db.query("SELECT * FROM device ORDER BY id")
    return [{**json.loads(row["state"]), "seenAt": row["seen_at"]} for row in rows]
