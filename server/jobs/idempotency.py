"""Idempotency-Key: which job a key stands for (draft-ietf-httpapi-idempotency-key-header).

A key is claimed in the transaction that charges, so a failed request leaves none behind. A replay is answered from the
job's row.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from pydantic import BaseModel
from sqlite_utils import Database

from server.errors import (
    GenerationFailed,
    IdempotencyKeyInvalid,
    IdempotencyKeyReused,
    RateLimited,
    StorageFull,
    Unavailable,
    from_code,
)
from server.jobs.job import Job, NewJob

KEY_LIFETIME_S = 24 * 3600.0
QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
BARE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")
MAX_LENGTH = 255


class KeyAlreadyClaimed(Exception):
    """A concurrent call claimed the key first: its job is the response."""


@dataclass(frozen=True)
class ReplayedJob:
    """The job that a key stands for, and the fields of its request that had no effect."""

    job_id: str
    ignored: frozenset[str]


def parse(values: list[str]) -> str | None:
    """The key in the header's values: quoted (RFC 8941) as the draft says, or bare as most clients send it.

    Raises IdempotencyKeyInvalid.
    """
    if not values:
        return None
    text = values[0].strip()
    quoted = QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if len(values) > 1 or not (quoted or BARE.fullmatch(text)) or not 1 <= len(key) <= MAX_LENGTH:
        raise IdempotencyKeyInvalid(f"The Idempotency-Key must be one string of 1 to {MAX_LENGTH} visible characters.")
    return key


def hash_of(body: BaseModel) -> str:
    """SHA-256 of the parsed body: whitespace and the order of known fields make no difference."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


def find(db: Database, user_id: str, route: str, key: str, body_hash: str, now: float) -> ReplayedJob | None:
    """The job that the key stands for. Raises IdempotencyKeyReused if its request had another body."""
    sql = "SELECT * FROM idempotency WHERE user_id = ? AND route = ? AND key = ? AND created_at > ?"
    for row in db.query(sql, [user_id, route, key, now - KEY_LIFETIME_S]):
        if row["body_hash"] != body_hash:
            raise IdempotencyKeyReused("This Idempotency-Key was used with another body before. Use a new one.")
        return ReplayedJob(row["job_id"], frozenset(json.loads(row["ignored"])))
    return None


def claim(db: Database, new: NewJob, now: float) -> None:
    """Makes the key stand for this job. Raises KeyAlreadyClaimed unless it is free or stands for `replaces`."""
    if new.idempotency is None:
        return
    db.execute("DELETE FROM idempotency WHERE created_at <= ?", [now - KEY_LIFETIME_S])
    changed = db.execute(
        "INSERT INTO idempotency VALUES (:user, :route, :key, :hash, :job, :ignored, :now)"
        " ON CONFLICT DO UPDATE SET job_id = :job, ignored = :ignored, created_at = :now WHERE job_id IS :replaces",
        {
            "user": new.user_id,
            "route": new.idempotency.route,
            "key": new.idempotency.key,
            "hash": new.idempotency.body_hash,
            "job": new.id,
            "ignored": json.dumps(sorted(new.ignored)),
            "now": now,
            "replaces": new.idempotency.replaces,
        },
    )
    if not changed.rowcount:
        raise KeyAlreadyClaimed


def is_replayable(job: Job) -> bool:
    """Whether a retry gets the same response. Not for a failure for lack of capacity: a new job may succeed."""
    if job.status != "failed":
        return True
    cls = from_code((job.error or {}).get("code", ""), GenerationFailed)
    return not issubclass(cls, Unavailable | StorageFull | RateLimited)
