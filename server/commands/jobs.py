"""`plantain jobs`."""

from pathlib import Path
from typing import Annotated

import typer

from server import promises
from server.clock import iso
from server.commands.accounts import Data, changing, show

COLUMNS = ["id", "email", "kind", "model", "status", "attempts", "credits", "device", "created", "seconds", "error"]


def register(app: typer.Typer) -> None:
    app.command("jobs")(list_jobs)


def list_jobs(
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    limit: int = 30,
    promised: Annotated[bool, typer.Option("--promises", help="How well expected starts were kept.")] = False,
    data: Data = Path("data"),
) -> None:
    """Everyone's jobs, newest first."""
    with changing(data) as db:
        if promised:
            return show([promises.kept(db)], ["jobs", "medianOffSeconds", "medianAbsoluteOffSeconds", "p95OffSeconds"])
        rows = list(
            db.query(
                "SELECT job.*, email, round(finished_at - started_at, 2) AS seconds, error ->> 'code' AS error"
                " FROM job JOIN user ON user.id = user_id WHERE :status IS NULL OR status = :status"
                " ORDER BY seq DESC LIMIT :limit",
                {"status": status, "limit": limit},
            )
        )
    for row in rows:
        row["created"] = iso(row["created_at"])
    return show(rows, COLUMNS)
