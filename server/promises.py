"""How far off it was, when each job was said to start: the instant told at its submit, and the one at which it did."""

import statistics
from typing import Any

from sqlite_utils import Database


def kept(db: Database, last: int = 1000) -> dict[str, Any]:
    """Over the last jobs that have started. `off` is positive where a job started later than was said."""
    rows = db.query(
        "SELECT started_at - promised_start_at AS off_s FROM job"
        " WHERE started_at IS NOT NULL AND promised_start_at IS NOT NULL ORDER BY seq DESC LIMIT ?",
        [last],
    )
    off_s = sorted(row["off_s"] for row in rows)
    if not off_s:
        return {"jobs": 0}
    return {
        "jobs": len(off_s),
        "medianOffSeconds": round(statistics.median(off_s), 2),
        "medianAbsoluteOffSeconds": round(statistics.median(abs(off) for off in off_s), 2),
        "p95OffSeconds": round(off_s[int(0.95 * (len(off_s) - 1))], 2),
    }
