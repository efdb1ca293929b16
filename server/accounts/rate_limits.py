"""Rate limits (moving windows) and the limit of concurrent jobs. Counted in the database, so they survive restarts.

Each function is part of its caller's transaction.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sqlite_utils import Database

from server.accounts import keys
from server.accounts.keys import MINUTE_S, KeyLimit
from server.accounts.plans import Plan
from server.errors import ConcurrencyLimit, RateLimited

SLACK_S = 1.0
"""Calls are kept this much longer than the longest window: two of one moment may be counted in either order."""


@dataclass(frozen=True)
class Window:
    """A moving window: `used` of `quota` calls in the last `window_s`. The next call is free again at `resets_at`."""

    name: str
    quota: int
    window_s: float
    used: int
    resets_at: float

    @property
    def remaining(self) -> int:
        return max(0, self.quota - self.used)


@dataclass(frozen=True)
class RateLimitStatus:
    """The state of a caller's limits after a call, for the response headers. `at` is the time of the call."""

    windows: Sequence[Window]
    plan: Plan
    unfinished: int
    at: float

    def headers(self) -> dict[str, str]:
        """The headers of draft-ietf-httpapi-ratelimit-headers, and the older names that most clients read."""
        found = {}
        if policies := ", ".join(self._policies()):
            found = {"RateLimit-Policy": policies, "RateLimit": ", ".join(self._states())}
        if self.windows:
            tightest = min(self.windows, key=lambda window: window.remaining)
            found["X-RateLimit-Limit"] = str(tightest.quota)
            found["X-RateLimit-Remaining"] = str(tightest.remaining)
            found["X-RateLimit-Reset"] = str(math.ceil(tightest.resets_at))
        return found

    def _policies(self) -> Iterator[str]:
        for window in self.windows:
            yield f'"{window.name}";q={window.quota};w={window.window_s:.0f}'
        if self.plan.jobs_at_once is not None:
            yield f'"concurrent";q={self.plan.jobs_at_once};qu="concurrent-requests"'

    def _states(self) -> Iterator[str]:
        for window in self.windows:
            yield f'"{window.name}";r={window.remaining};t={seconds_until(window.resets_at, self.at)}'
        if self.plan.jobs_at_once is not None:
            yield f'"concurrent";r={max(0, self.plan.jobs_at_once - self.unfinished)}'


def count_call(db: Database, user_id: str, plan: Plan, key: KeyLimit | None, now: float) -> RateLimitStatus:
    """Counts one call against the user's plan and the key's own limit.

    Raises RateLimited or UsageExceeded, and then counts nothing.
    """
    quotas = [("minute", "user_id", user_id, plan.requests_a_minute, MINUTE_S)]
    if key:
        quotas.append(("key", "key_id", key.key_id, key.quota, key.window_s))
    windows = [_window(db, *limited, now) for limited in quotas if limited[3] is not None]  # type: ignore[arg-type]
    status = RateLimitStatus(windows, plan, unfinished(db, user_id), now)
    for window in windows:
        if not window.remaining:
            raise _rate_limited(window, status)
    if key and key.remaining_calls is not None:
        keys.consume_quota(db, key.key_id)
    if windows:
        _prune(db, user_id, now)
        db.execute("INSERT INTO call VALUES (?, ?, ?)", [user_id, key and key.key_id, now])
    return replace(status, windows=[replace(window, used=window.used + 1) for window in windows])


def reserve_slot(db: Database, user_id: str, max_concurrent_jobs: int | None, now: float) -> None:
    """Raises ConcurrencyLimit if the user has that many unfinished jobs. Part of the transaction that adds the job."""
    if max_concurrent_jobs is None or (has := unfinished(db, user_id)) < max_concurrent_jobs:
        return
    wait_s = max(1, math.ceil(_soonest_end_s(db, user_id, now)))
    jobs = "1 job" if max_concurrent_jobs == 1 else f"{max_concurrent_jobs} jobs"
    raise ConcurrencyLimit(
        f"Your plan runs {jobs} at once, and you have {has}. Try again when one has finished.",
        headers={"Retry-After": str(wait_s)},
        limit=max_concurrent_jobs,
        retryAfter=wait_s,
        **{"violated-policies": ["concurrent"]},
    )


def unfinished(db: Database, user_id: str) -> int:
    """The number of the user's jobs that are queued or running."""
    sql = "SELECT count(*) FROM job WHERE user_id = ? AND status IN ('queued', 'running')"
    return db.execute(sql, [user_id]).fetchone()[0]


def seconds_until(instant: float, now: float) -> int:
    """Whole seconds for `Retry-After`: rounded up, at least 1."""
    return max(1, math.ceil(instant - now))


def _window(db: Database, name: str, column: str, owner: str, quota: int, window_s: float, now: float) -> Window:
    """The window's state. The call that must expire first is not always the oldest: the quota may have been lowered."""
    where = f"FROM call WHERE {column} = ? AND called_at > ?"
    values = [owner, now - window_s]
    used = db.execute(f"SELECT count(*) {where}", values).fetchone()[0]
    oldest = f"SELECT called_at {where} ORDER BY called_at LIMIT 1 OFFSET ?"
    found = db.execute(oldest, [*values, max(0, used - quota)]).fetchone()
    return Window(name, quota, window_s, used, (found[0] if found else now) + window_s)


def _prune(db: Database, user_id: str, now: float) -> None:
    """Deletes the user's calls that no window can see, and those that a clock since set back dated in the future."""
    window_s = max(MINUTE_S, keys.longest_window_s(db, user_id)) + SLACK_S
    db.execute(
        "DELETE FROM call WHERE user_id = ? AND (called_at < ? OR called_at > ?)",
        [user_id, now - window_s, now + window_s],
    )


def _rate_limited(window: Window, status: RateLimitStatus) -> RateLimited:
    wait_s = seconds_until(window.resets_at, status.at)
    whose = "This API key" if window.name == "key" else "Your plan"
    span = "a minute" if window.window_s == MINUTE_S else f"in {window.window_s:.0f} s"
    return RateLimited(
        f"{whose} allows {window.quota} requests {span}. Try again in {wait_s} s.",
        headers={**status.headers(), "Retry-After": str(wait_s)},
        retryAfter=wait_s,
        **{"violated-policies": [window.name]},
    )


def _soonest_end_s(db: Database, user_id: str, now: float) -> float:
    """Estimated seconds until one of the user's running jobs ends: the model's last 5 durations, less the time run."""
    found = db.execute(
        "SELECT min(job.started_at + (SELECT avg(took) FROM (SELECT finished_at - started_at AS took FROM job AS past"
        " WHERE past.model = job.model AND past.status = 'succeeded' AND past.seq > job.seq - 1000"
        " ORDER BY seq DESC LIMIT 5))) - ?"
        " FROM job WHERE user_id = ? AND status = 'running'",
        [now, user_id],
    ).fetchone()[0]
    return found or 0.0
