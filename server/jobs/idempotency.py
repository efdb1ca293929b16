"""Idempotency-Key: which job a key stands for. Claimed in the transaction that charges, so it needs no clean-up.

The stored answer is the job's own row: what is told of it the second time is told of it the first time too.
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
LONGEST = 255


class KeyAlreadyClaimed(Exception):
    """Another call with the same key was quicker: its job is the one to answer with."""


@dataclass(frozen=True)
class ReplayedJob:
    """The job that a key stands for, and the fields of the request that had no effect on it."""

    job_id: str
    ignored: frozenset[str]


def parse(values: list[str]) -> str | None:
    """The key of the header's values: a structured string as the draft says, or bare as everyone sends it."""
    if not values:
        return None
    text = values[0].strip()
    quoted = QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if len(values) > 1 or not (quoted or BARE.fullmatch(text)) or not 1 <= len(key) <= LONGEST:
        raise IdempotencyKeyInvalid(f"The Idempotency-Key must be one string of 1 to {LONGEST} visible characters.")
    return key


def hash_of(body: BaseModel) -> str:
    """Of what was asked, not of how it was written: blanks and the order of known fields make no difference."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


def find(db: Database, user_id: str, route: str, key: str, body_hash: str, now: float) -> ReplayedJob | None:
    """What the key stands for. Raises IdempotencyKeyReused if that was another body."""
    sql = "SELECT * FROM idempotency WHERE user_id = ? AND route = ? AND key = ? AND created_at > ?"
    for row in db.query(sql, [user_id, route, key, now - KEY_LIFETIME_S]):
        if row["body_hash"] != body_hash:
            raise IdempotencyKeyReused("This Idempotency-Key came with another body before. Take a new one.")
        return ReplayedJob(row["job_id"], frozenset(json.loads(row["ignored"])))
    return None


def claim(db: Database, new: NewJob, now: float) -> None:
    """Make the key stand for this job. Raises KeyTaken if it stands for one that was not known of."""
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
    """Whether the answer is told again. A failure for want of room or connection is not: a retry may do better."""
    if job.status != "failed":
        return True
    cls = from_code((job.error or {}).get("code", ""), GenerationFailed)
    return not issubclass(cls, Unavailable | StorageFull | RateLimited)
