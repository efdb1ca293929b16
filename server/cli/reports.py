"""`plantain jobs`, `plans`, `usage` and `audit`: reports from the database, with the server running or not."""

import time
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from server.accounts import admin, usage, users
from server.accounts.pricing import fal_prices
from server.accounts.usage import Period
from server.cli.common import DATA, Data, open_database, print_table
from server.cli.users import plans
from server.jobs import store
from server.settings import Settings
from server.timestamps import iso

JOB_COLUMNS = ["id", "email", "kind", "model", "status", "attempts", "credits", "device", "created", "seconds", "error"]
USAGE_COLUMNS = ["day", "email", "key_name", "model", "served_by", *usage.SUMS, "fal_cost_usd"]


def register(app: typer.Typer) -> None:
    app.command("jobs")(list_jobs)
    app.command("plans")(list_plans)
    app.command("usage")(show_usage)
    app.command("audit")(list_audit_entries)


def list_plans(data: Data = DATA) -> None:
    """List the plans and their limits. Change them in plans.toml in the data folder."""
    with open_database(data):
        print_table(
            [asdict(plan) for plan in plans(data).values()], ["name", "requests_a_minute", "jobs_at_once", "weight"]
        )


def show_usage(
    user: Annotated[str | None, typer.Option(help="One user's e-mail address. [everyone]")] = None,
    days: Annotated[int, typer.Option(min=1)] = 30,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    data: Data = DATA,
) -> None:
    """Report calls, credits and device-seconds by day, key and model."""
    today = _day(time.time())
    with open_database(data) as db:
        user_id = users.user_by_email(db, user) if user else None
        prices = fal_prices(Settings(data=data).fal_prices_toml)
        lines = usage.read(db, user_id, Period(today - timedelta(days=days - 1), today), prices)
    if as_csv:
        typer.echo(usage.as_csv(lines), nl=False)
    else:
        print_table([asdict(line) for line in lines], USAGE_COLUMNS)


def list_audit_entries(limit: int = 30, data: Data = DATA) -> None:
    """List the audit log of admin actions, newest first."""
    with open_database(data) as db:
        rows = admin.audit_entries(db, None, limit)
    for row in rows:
        row |= {"at": iso(row["created_at"]), "action": row["act"]}
    print_table(rows, ["at", "actor", "action", "subject", "detail"])


def list_jobs(
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    limit: int = 30,
    prediction_error: Annotated[
        bool, typer.Option("--prediction-error", help="The error of predicted start times.")
    ] = False,
    data: Data = Path("data"),
) -> None:
    """List the jobs of all users, newest first."""
    with open_database(data) as db:
        if prediction_error:
            return print_table(
                [store.start_prediction_error(db)],
                ["jobs", "medianOffSeconds", "medianAbsoluteOffSeconds", "p95OffSeconds"],
            )
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
    return print_table(rows, JOB_COLUMNS)


def _day(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()
