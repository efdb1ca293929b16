"""The tries that ran out of memory, and what each device last said of itself: rows in the database."""

import json
from collections.abc import Mapping
from typing import Any

from sqlite_utils import Database

from server.ladder import Rung


def record_rung(db: Database, job_id: str, model: str, failed: Rung, following: Rung | None, now: float) -> None:
    """A try ran out of memory; `following` is the next one, None if there is none."""
    db.execute(
        "INSERT INTO rung (job_id, model, device, way, next_device, next_way, failed_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            job_id,
            model,
            failed.device,
            failed.way.name,
            following.device if following else None,
            following.way.name if following else None,
            now,
        ],
    )


def read_rungs(db: Database, device: str | None = None, limit: int = 20) -> list[dict[str, Any]]:
    """The last ones, newest first."""
    return list(
        db.query(
            "SELECT * FROM rung WHERE :device IS NULL OR device = :device ORDER BY id DESC LIMIT :limit",
            {"device": device, "limit": limit},
        )
    )


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
