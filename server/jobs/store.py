"""The job table: every statement that reads or changes jobs and their files."""

import json
import statistics
from collections.abc import Mapping
from typing import Any

from server.accounts import ledger, rate_limits
from server.db.database import Connection, Database
from server.jobs import idempotency
from server.jobs.job import MAX_ATTEMPTS, FinishedRun, Job, NewJob

WORKER_CRASHED = {"error": "The worker process crashed twice while running this job.", "code": "GENERATION_FAILED"}
NO_PROGRESS = {
    "error": "The job made no progress for many times its expected duration, twice.",
    "code": "GENERATION_TIMEOUT",
}
SUBMIT_UNKNOWN = {
    "error": "The server stopped while submitting this job to fal.ai. It may have arrived, so it is not sent again.",
    "code": "REMOTE_SUBMIT_UNKNOWN",
}

COLUMNS = {"remote_fallback": "overflow", "predicted_start_at": "promised_start_at"}
"""Fields whose columns have an older name."""
JSON_FIELDS = ("params", "output", "error", "remote_fallback")


def row_of(new: NewJob, now: float) -> dict[str, Any]:
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
        "overflow": json.dumps(new.remote_fallback) if new.remote_fallback else None,
        "weight": new.weight,
        "weights": new.weights,
    }


def job_of(row: dict[str, Any]) -> Job:
    fields = {name: row[COLUMNS.get(name, name)] for name in Job.__dataclass_fields__}
    for name in JSON_FIELDS:
        fields[name] = json.loads(fields[name]) if fields[name] else None
    return Job(**fields)


class JobStore:
    """Jobs and the files that belong to them. Each method is one statement or one transaction, and blocks."""

    def __init__(self, database: Database) -> None:
        self.database, self.db = database, database.db

    def insert(self, new: NewJob, now: float) -> tuple[Job, int]:
        """Claims the Idempotency-Key, reserves a slot, charges and queues, in one transaction.

        Returns the job and the balance. Raises KeyAlreadyClaimed, ConcurrencyLimit or InsufficientCredits.
        """
        row = row_of(new, now)
        with self.database.atomic() as db:
            if new.idempotency:
                idempotency.claim(db, new, now)
            rate_limits.reserve_slot(db, new.user_id, new.max_concurrent_jobs, now)
            if new.auto_top_up:
                ledger.top_up(db, new.user_id, new.credits, now)
            balance = ledger.charge(db, new.user_id, new.credits, new.id, now)
            db.table("job").insert(row)
            for name in new.input_names:
                self._add_file(name, new.user_id, "input", new.id, now)
        return self.job(new.id), balance

    def start(self, job_id: str, device: str, now: float, predicted_start_at: float | None = None) -> Job | None:
        """Queued → running. None if it is no longer queued. The prediction of its first start is kept."""
        return self._update_returning(
            "UPDATE job SET status = 'running', device = :device, served_by = 'local', started_at = :now,"
            " attempts = attempts + 1, promised_start_at = coalesce(promised_start_at, :predicted)"
            " WHERE id = :id AND status = 'queued' RETURNING *",
            {"id": job_id, "device": device, "now": now, "predicted": predicted_start_at},
        )

    def start_remote(self, job_id: str, now: float) -> Job | None:
        """Queued → running, before the request is sent to fal. None if it is no longer queued."""
        return self._update_returning(
            "UPDATE job SET status = 'running', started_at = :now, attempts = attempts + 1"
            " WHERE id = :id AND status = 'queued' RETURNING *",
            {"id": job_id, "now": now},
        )

    def move_to_remote(self, job_id: str) -> Job | None:
        """Queued or running on a local device → queued for fal, as its `remote_fallback` says, without another charge.

        None if it has finished or may not run there. One statement, so that it is never both local and remote.
        """
        return self._update_returning(
            "UPDATE job SET status = 'queued', device = NULL, started_at = NULL, promised_start_at = NULL,"
            " attempts = attempts - (status = 'running'), served_by = 'fal', overflow = NULL, weights = NULL,"
            " remote_endpoint = json_extract(overflow, '$.endpoint'), params = json_extract(overflow, '$.params')"
            " WHERE id = :id AND status IN ('queued', 'running') AND overflow IS NOT NULL RETURNING *",
            {"id": job_id},
        )

    def record_request_id(self, job_id: str, request_id: str) -> None:
        """Stores fal's id of the request. The job is polled only after this is stored."""
        with self.database.atomic() as db:
            db.execute("UPDATE job SET remote_request_id = ? WHERE id = ?", [request_id, job_id])

    def recover_remote(self, now: float) -> list[Job]:
        """At start, after `requeue_interrupted`: the unfinished remote jobs. Fails those interrupted at submit."""
        lost = "SELECT id FROM job WHERE status = 'running' AND served_by = 'fal' AND remote_request_id IS NULL"
        for row in list(self.db.query(lost)):
            self.fail(row["id"], SUBMIT_UNKNOWN, now)
        unfinished = "SELECT * FROM job WHERE status IN ('queued', 'running') AND served_by = 'fal' ORDER BY seq"
        return [job_of(row) for row in self.db.query(unfinished)]

    def succeed(self, job_id: str, output: Mapping[str, Any], now: float, name: str | None = None) -> Job | None:
        """Running → succeeded; adds its output file. None if it is no longer running.

        `name` is the output's, if it became known only now.
        """
        with self.database.atomic():
            job = self._update_returning(
                "UPDATE job SET status = 'succeeded', finished_at = :now, output = :output,"
                " output_name = coalesce(:name, output_name) WHERE id = :id AND status = 'running' RETURNING *",
                {"id": job_id, "now": now, "output": json.dumps(output), "name": name},
            )
            if job:
                self._add_file(job.output_name, job.user_id, "output", job.id, now)
        return job

    def fail(self, job_id: str, error: dict[str, Any], now: float) -> Job | None:
        """Queued or running → failed, refunded in the same transaction. None if it had finished before."""
        return self._finish_and_refund(job_id, "failed", error, now)

    def cancel(self, job_id: str, now: float) -> Job | None:
        """Queued or running → cancelled, refunded in the same transaction. None if it had finished before."""
        return self._finish_and_refund(
            job_id, "cancelled", {"error": "The job was cancelled.", "code": "CANCELLED"}, now
        )

    def requeue(
        self, job_id: str, now: float, *, count_attempt: bool = True, error: dict[str, Any] = WORKER_CRASHED
    ) -> Job | None:
        """Running → queued, at its old position; after its last attempt → failed with `error` and refunded."""
        with self.database.atomic():
            job = self._update_returning(
                "UPDATE job SET status = 'queued', device = NULL, started_at = NULL,"
                " attempts = attempts - :uncount WHERE id = :id AND status = 'running'"
                " AND (attempts < :most OR :uncount) RETURNING *",
                {"id": job_id, "most": MAX_ATTEMPTS, "uncount": 0 if count_attempt else 1},
            )
        return job or self.fail(job_id, error, now)

    def requeue_interrupted(self, now: float) -> list[Job]:
        """At start: requeues or fails the local jobs that were running when the server stopped.

        Returns the queued jobs, oldest first.
        """
        running = "SELECT id FROM job WHERE status = 'running' AND served_by IS NOT 'fal'"
        for row in list(self.db.query(running)):
            self.requeue(row["id"], now)
        queued = "SELECT * FROM job WHERE status = 'queued' AND served_by IS NOT 'fal' ORDER BY seq"
        return [job_of(row) for row in self.db.query(queued)]

    def completed_runs(self, since: float, most: int = 10_000) -> list[FinishedRun]:
        """The last runs on local devices that finished after `since`, oldest first."""
        rows = self.db.query(
            "SELECT id AS job_id, user_id, weight, created_at, started_at, finished_at FROM job"
            " WHERE started_at IS NOT NULL AND finished_at > :since AND served_by IS NOT 'fal'"
            " ORDER BY seq DESC LIMIT :most",
            {"since": since, "most": most},
        )
        return [FinishedRun(**row) for row in rows][::-1]

    def set_priority(self, job_id: str, priority: int) -> Job | None:
        """Changes the priority. None if the job is no longer queued."""
        sql = "UPDATE job SET priority = :priority WHERE id = :id AND status = 'queued' RETURNING *"
        with self.database.atomic():
            return self._update_returning(sql, {"id": job_id, "priority": priority})

    def pause(self, what: str, now: float) -> None:
        """Stores that the queue, or a device, starts nothing until `resume`, restarts included."""
        with self.database.atomic() as db:
            db.execute("INSERT OR IGNORE INTO halt VALUES (?, ?)", [what, now])

    def resume(self, what: str) -> None:
        with self.database.atomic() as db:
            db.execute("DELETE FROM halt WHERE what = ?", [what])

    def paused(self) -> set[str]:
        """The paused devices, and the queue if it is paused."""
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
        """The names of all files in use, future outputs of unfinished jobs included."""
        rows = self.db.query(
            "SELECT name FROM file UNION SELECT output_name FROM job WHERE status IN ('queued', 'running')"
        )
        return {row["name"] for row in rows}

    def _finish_and_refund(self, job_id: str, status: str, error: dict[str, Any], now: float) -> Job | None:
        with self.database.atomic() as db:
            job = self._update_returning(
                "UPDATE job SET status = :status, finished_at = :now, error = :error"
                " WHERE id = :id AND status IN ('queued', 'running') RETURNING *",
                {"id": job_id, "status": status, "now": now, "error": json.dumps(error)},
            )
            if job:
                ledger.refund(db, job_id, now)
        return job

    def _update_returning(self, sql: str, values: dict[str, Any]) -> Job | None:
        return next((job_of(row) for row in self.db.query(sql, values)), None)

    def _add_file(self, name: str, user_id: str, origin: str, job_id: str | None, now: float) -> None:
        self.db.table("file").insert(
            {"name": name, "user_id": user_id, "job_id": job_id, "origin": origin, "created_at": now}, ignore=True
        )


def start_prediction_error(db: Connection, last: int = 1000) -> dict[str, Any]:
    """The error of predicted starts, over the last started jobs. Positive: the job started later than predicted."""
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
