"""The tries that ran out of memory, and what each device last said of itself: rows in the database."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from pipelines.base import TIERS, Way
from server.ladder import Rung

FAL = "fal"
"""What `next_device` is of a job's last try here, where it goes to fal then."""


def record_rung(
    db: Database,
    job_id: str,
    model: str,
    failed: Rung,
    following: Rung | None,
    now: float,
    *,
    budget_bytes: int,
    then_fal: bool = False,
) -> None:
    """A try ran out of memory, on a device of this budget; `following` is the next one here, None if there is none."""
    db.table("rung").insert(
        {
            "job_id": job_id,
            "model": model,
            "device": failed.device,
            "way": failed.way.name,
            "next_device": following.device if following else FAL if then_fal else None,
            "next_way": following.way.name if following else None,
            "failed_at": now,
            "budget_bytes": budget_bytes,
        }
    )


def read_rungs(db: Database, device: str | None = None, limit: int = 20) -> list[dict[str, Any]]:
    """The last ones, newest first."""
    return list(
        db.query(
            "SELECT * FROM rung WHERE :device IS NULL OR device = :device ORDER BY id DESC LIMIT :limit",
            {"device": device, "limit": limit},
        )
    )


@dataclass(frozen=True)
class Forced:
    """A way that a job ran out of memory in, with this budget, before it ended well on the same device in another."""

    job_id: str
    way: Way
    budget_bytes: int


def read_forced(db: Database, since: float) -> list[Forced]:
    """Oldest first. A job that ended at fal tells nothing of the device."""
    rows = db.query(FORCED, {"since": since})
    return [Forced(row["job_id"], way_of(row["way"]), row["budget_bytes"]) for row in rows]


def way_of(name: str) -> Way:
    """`staged, tiled` -> the way that has this name."""
    return next(Way(tier, tiled) for tier in TIERS for tiled in (False, True) if Way(tier, tiled).name == name)


FORCED = """
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
