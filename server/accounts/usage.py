"""Usage report: jobs by day, user, key, model and where they ran, aggregated from the job table."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pydantic.alias_generators import to_camel
from sqlite_utils import Database

from server.accounts.pricing import FalPrice
from server.timestamps import instant

COUNTED = """
SELECT date(job.created_at, 'unixepoch') AS day, user_id, email, key_id, apikey.name AS key_name, model,
    served_by, count(*) AS calls,
    sum(job.status = 'succeeded') AS succeeded, sum(job.status = 'failed') AS failures,
    sum(job.status = 'cancelled') AS cancelled,
    sum(CASE WHEN job.status IN ('failed', 'cancelled') THEN 0 ELSE job.credits END) AS credits,
    total(CASE WHEN served_by = 'local' THEN finished_at - started_at END) AS device_s,
    total(CASE WHEN job.status = 'succeeded' THEN job.params ->> 'duration' END) AS video_s,
    sum(CASE WHEN job.status = 'succeeded' THEN pixels ELSE 0 END) AS pixels
FROM job JOIN user ON user.id = user_id LEFT JOIN apikey ON apikey.id = key_id
WHERE job.created_at >= :since AND job.created_at < :until AND (:user IS NULL OR user_id = :user)
GROUP BY day, user_id, key_id, model, served_by
ORDER BY day DESC, email, key_id, model, served_by
"""
SUMS = ("calls", "succeeded", "failures", "cancelled", "credits", "device_s")
COLUMNS = (
    "day", "user_id", "email", "key_id", "key_name", "model", "served_by", *SUMS, "fal_cost_usd",
)  # fmt: skip
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins with one of these for a formula.

https://owasp.org/www-community/attacks/CSV_Injection
"""


@dataclass(frozen=True)
class Period:
    """Whole days in UTC, both included."""

    first: date
    last: date

    @property
    def since(self) -> float:
        return instant(self.first.isoformat())

    @property
    def until(self) -> float:
        return instant((self.last + timedelta(days=1)).isoformat())


@dataclass(frozen=True)
class Usage:
    """One line of the report. `served_by` is `local`, `fal`, or None for jobs that never started.

    `device_s` are the seconds that jobs held a local device. `fal_cost_usd` is what the succeeded jobs would have cost
    at fal; None if the operator's table has no price for the model.
    """

    day: str
    user_id: str
    email: str
    key_id: str | None
    key_name: str | None
    model: str
    served_by: str | None
    calls: int
    succeeded: int
    failures: int
    cancelled: int
    credits: int
    device_s: float
    fal_cost_usd: float | None


def read(db: Database, user_id: str | None, period: Period, prices: Mapping[str, FalPrice]) -> list[Usage]:
    """The lines of one user, or of all, newest day first."""
    rows = db.query(COUNTED, {"user": user_id, "since": period.since, "until": period.until})
    return [_usage(row, prices.get(row["model"])) for row in rows]


def totals(lines: Sequence[Usage]) -> dict[str, Any]:
    """Sums, in camelCase. The cost is None unless every line with succeeded jobs has one."""
    found: dict[str, Any] = {name: sum(getattr(line, name) for line in lines) for name in SUMS}
    costs = [line.fal_cost_usd for line in lines if line.succeeded]
    cost = None if None in costs else round(sum(cost for cost in costs if cost), 6)
    return camel({**found, "device_s": round(found["device_s"], 3), "fal_cost_usd": cost})


def as_json(lines: Iterable[Usage]) -> list[dict[str, Any]]:
    return [camel({name: getattr(line, name) for name in COLUMNS}) for line in lines]


def as_csv(lines: Iterable[Usage]) -> str:
    """CSV, with text escaped that a spreadsheet would take for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([to_camel(name) for name in COLUMNS])
    writer.writerows([_escape_formula(getattr(line, name)) for name in COLUMNS] for line in lines)
    return out.getvalue()


def camel(row: Mapping[str, Any]) -> dict[str, Any]:
    return {to_camel(name): value for name, value in row.items()}


def _usage(row: Mapping[str, Any], price: FalPrice | None) -> Usage:
    cost = price.of(row["succeeded"], row["video_s"], row["pixels"]) if price else None
    kept = {name: row[name] for name in COLUMNS if name not in ("device_s", "fal_cost_usd")}
    return Usage(**kept, device_s=round(row["device_s"], 3), fal_cost_usd=None if cost is None else round(cost, 6))


def _escape_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
