"""One SQLite file: jobs and the files that belong to them. Each method is one statement or one transaction."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlite_utils import Database

from server import idempotency, ledger, limits
from server.jobs import MAX_ATTEMPTS, Job, NewJob
from server.opening import open_database
from server.rows import INTERRUPTED, LOST_ON_THE_WAY, job_of, ran_of, row_of
from server.turns import Ran

P = ParamSpec("P")
T = TypeVar("T")


class Store:
    """The open database. Its methods block: from the event loop, go through `call`.

    All calls of one process run on one thread, one after the other: one writer, no locks. Raises DatabaseUnusable.
    """

    def __init__(self, path: Path) -> None:
        self.db = open_database(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of this store, or a function that takes `store.db`, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._thread.shutdown()
        self.db.close()

    @contextmanager
    def atomic(self) -> Iterator[Database]:
        """A transaction that takes the write lock at its start, so that what it reads still holds when it writes."""
        try:
            self.db.conn.execute("BEGIN IMMEDIATE")  # in here: it can break off with the transaction open
            yield self.db
            self.db.conn.execute("COMMIT")
        except BaseException:
            self.db.rollback()
            raise

    def insert(self, new: NewJob, now: float, promised_start_at: float | None = None) -> tuple[Job, int]:
        """Claim the Idempotency-Key, take a slot of the plan, charge and queue: all in one transaction, or nothing.

        Returns the job and the balance. Raises KeyTaken, ConcurrencyLimit or InsufficientCredits, in this order.
        """
        row = row_of(new, now, promised_start_at)
        with self.atomic() as db:
            idempotency.claim(db, new, now)
            limits.take_slot(db, new.user_id, new.at_once, now)
            if new.tops_up:
                ledger.top_up(db, new.user_id, new.credits, now)
            balance = ledger.charge(db, new.user_id, new.credits, new.id, now)
            db.table("job").insert(row)
            for name in new.input_names:
                self._add_file(name, new.user_id, "input", new.id, now)
        return self.job(new.id), balance

    def start(self, job_id: str, device: str, now: float) -> Job | None:
        """Queued → running. None if it is queued no more."""
        return self._changed(
            "UPDATE job SET status = 'running', device = :device, served_by = 'local', started_at = :now,"
            " attempts = attempts + 1 WHERE id = :id AND status = 'queued' RETURNING *",
            {"id": job_id, "device": device, "now": now},
        )

    def start_remote(self, job_id: str, now: float) -> Job | None:
        """Queued → running, before the request is sent to fal. None if it is queued no more."""
        return self._changed(
            "UPDATE job SET status = 'running', started_at = :now, attempts = attempts + 1"
            " WHERE id = :id AND status = 'queued' RETURNING *",
            {"id": job_id, "now": now},
        )

    def hand_over(self, job_id: str) -> Job | None:
        """Here, queued or running → queued for fal, as its `overflow` says, at what it was charged already.

        None if it has ended, or may not run there. One statement: it is never a job of both places.
        """
        return self._changed(
            "UPDATE job SET status = 'queued', device = NULL, started_at = NULL, promised_start_at = NULL,"
            " attempts = attempts - (status = 'running'), served_by = 'fal', overflow = NULL, weights = NULL,"
            " remote_endpoint = json_extract(overflow, '$.endpoint'), params = json_extract(overflow, '$.params')"
            " WHERE id = :id AND status IN ('queued', 'running') AND overflow IS NOT NULL RETURNING *",
            {"id": job_id},
        )

    def keep_request_id(self, job_id: str, request_id: str) -> None:
        """By which fal knows the job; it is followed only once this is written."""
        with self.atomic() as db:
            db.execute("UPDATE job SET remote_request_id = ? WHERE id = ?", [request_id, job_id])

    def recover_remote(self, now: float) -> list[Job]:
        """At start, after `recover`: the jobs at fal, and those on their way. One that died in between is failed."""
        lost = "SELECT id FROM job WHERE status = 'running' AND served_by = 'fal' AND remote_request_id IS NULL"
        for row in list(self.db.query(lost)):
            self.fail(row["id"], LOST_ON_THE_WAY, now)
        going_on = "SELECT * FROM job WHERE status IN ('queued', 'running') AND served_by = 'fal' ORDER BY seq"
        return [job_of(row) for row in self.db.query(going_on)]

    def succeed(self, job_id: str, output: Mapping[str, Any], now: float, name: str | None = None) -> Job | None:
        """Running → succeeded, and its output file is known from now on. None if it runs no more.

        `name` is the output's, where it was known only at the end.
        """
        with self.atomic():
            job = self._changed(
                "UPDATE job SET status = 'succeeded', finished_at = :now, output = :output,"
                " output_name = coalesce(:name, output_name) WHERE id = :id AND status = 'running' RETURNING *",
                {"id": job_id, "now": now, "output": json.dumps(output), "name": name},
            )
            if job:
                self._add_file(job.output_name, job.user_id, "output", job.id, now)
        return job

    def fail(self, job_id: str, error: dict[str, Any], now: float) -> Job | None:
        """Queued or running → failed, refunded in the same transaction. None if it had ended before."""
        return self._end_unpaid(job_id, "failed", error, now)

    def cancel(self, job_id: str, now: float) -> Job | None:
        """Queued or running → cancelled, refunded in the same transaction. None if it had ended before."""
        return self._end_unpaid(job_id, "cancelled", {"error": "The job was cancelled.", "code": "CANCELLED"}, now)

    def requeue(
        self, job_id: str, now: float, *, count_attempt: bool = True, error: dict[str, Any] = INTERRUPTED
    ) -> Job | None:
        """Running → queued, at its old place; after its last attempt → failed with `error` and refunded."""
        with self.atomic():
            job = self._changed(
                "UPDATE job SET status = 'queued', device = NULL, started_at = NULL,"
                " attempts = attempts - :uncount WHERE id = :id AND status = 'running'"
                " AND (attempts < :most OR :uncount) RETURNING *",
                {"id": job_id, "most": MAX_ATTEMPTS, "uncount": 0 if count_attempt else 1},
            )
        return job or self.fail(job_id, error, now)

    def recover(self, now: float) -> list[Job]:
        """At start: what a dead server left running is queued again or failed. Returns the queue, oldest first."""
        running = "SELECT id FROM job WHERE status = 'running' AND served_by IS NOT 'fal'"
        for row in list(self.db.query(running)):
            self.requeue(row["id"], now)
        queued = "SELECT * FROM job WHERE status = 'queued' AND served_by IS NOT 'fal' ORDER BY seq"
        return [job_of(row) for row in self.db.query(queued)]

    def ran(self, since: float, most: int = 10_000) -> list[Ran]:
        """What ran here to its end since then, the last ones: for the books of who has had how much."""
        rows = self.db.query(
            "SELECT id, user_id, weight, created_at, started_at, finished_at FROM job WHERE started_at IS NOT NULL"
            " AND finished_at > :since AND served_by IS NOT 'fal' ORDER BY seq DESC LIMIT :most",
            {"since": since, "most": most},
        )
        return [ran_of(row) for row in rows][::-1]

    def prioritise(self, job_id: str, priority: int) -> Job | None:
        """None if it waits no more."""
        sql = "UPDATE job SET priority = :priority WHERE id = :id AND status = 'queued' RETURNING *"
        with self.atomic():
            return self._changed(sql, {"id": job_id, "priority": priority})

    def halt(self, what: str, now: float) -> None:
        """Write down that the queue, or a device, is to start nothing: it holds until `resume`, restarts or not."""
        with self.atomic() as db:
            db.execute("INSERT OR IGNORE INTO halt VALUES (?, ?)", [what, now])

    def resume(self, what: str) -> None:
        with self.atomic() as db:
            db.execute("DELETE FROM halt WHERE what = ?", [what])

    def halted(self) -> set[str]:
        return {row["what"] for row in self.db.query("SELECT what FROM halt")}

    def job(self, job_id: str) -> Job:
        """Raises KeyError."""
        for row in self.db.query("SELECT * FROM job WHERE id = ?", [job_id]):
            return job_of(row)
        raise KeyError(job_id)

    def jobs(self, user_id: str | None, before: str | None, limit: int, status: str | None = None) -> list[Job]:
        """Jobs of one user, or of all, newest first, older than the job `before`."""
        rows = self.db.query(
            "SELECT * FROM job WHERE (:user IS NULL OR user_id = :user) AND (:status IS NULL OR status = :status)"
            " AND seq < coalesce((SELECT seq FROM job WHERE id = :before), 9e18) ORDER BY seq DESC LIMIT :limit",
            {"user": user_id, "before": before, "limit": limit, "status": status},
        )
        return [job_of(row) for row in rows]

    def add_upload(self, name: str, user_id: str, now: float) -> None:
        self._add_file(name, user_id, "upload", None, now)

    def file_names(self) -> set[str]:
        """Every file that belongs to something, the outputs that are still to come included."""
        rows = self.db.query(
            "SELECT name FROM file UNION SELECT output_name FROM job WHERE status IN ('queued', 'running')"
        )
        return {row["name"] for row in rows}

    def _end_unpaid(self, job_id: str, status: str, error: dict[str, Any], now: float) -> Job | None:
        with self.atomic() as db:
            job = self._changed(
                "UPDATE job SET status = :status, finished_at = :now, error = :error"
                " WHERE id = :id AND status IN ('queued', 'running') RETURNING *",
                {"id": job_id, "status": status, "now": now, "error": json.dumps(error)},
            )
            if job:
                ledger.refund(db, job_id, now)
        return job

    def _changed(self, sql: str, values: dict[str, Any]) -> Job | None:
        return next((job_of(row) for row in self.db.query(sql, values)), None)

    def _add_file(self, name: str, user_id: str, origin: str, job_id: str | None, now: float) -> None:
        self.db.table("file").insert(
            {"name": name, "user_id": user_id, "job_id": job_id, "origin": origin, "created_at": now}, ignore=True
        )
