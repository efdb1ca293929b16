"""`plantain plans`, `plantain usage`, `plantain audit`."""

import time
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

import typer

from server import accounts, audit, usage
from server.clock import iso
from server.commands.accounts import DATA, Data, changing, plans, show
from server.prices import fal_prices
from server.settings import Settings
from server.usage import Period

COLUMNS = ["day", "email", "key_name", "model", "served_by", *usage.SUMS, "fal_cost_usd"]


def register(app: typer.Typer) -> None:
    app.command("plans")(list_plans)
    app.command("usage")(show_usage)
    app.command("audit")(list_acts)


def list_plans(data: Data = DATA) -> None:
    """What each plan allows. To change them, write plans.toml in the data folder."""
    with changing(data):
        show([asdict(plan) for plan in plans(data).values()], ["name", "requests_a_minute", "jobs_at_once", "weight"])


def show_usage(
    user: Annotated[str | None, typer.Option(help="One user's e-mail address. [everyone]")] = None,
    days: Annotated[int, typer.Option(min=1)] = 30,
    as_csv: Annotated[bool, typer.Option("--csv", help="For a spreadsheet.")] = False,
    data: Data = DATA,
) -> None:
    """Calls, credits and device-seconds by day, key and model."""
    today = _day(time.time())
    with changing(data) as db:
        user_id = accounts.user_by_email(db, user) if user else None
        prices = fal_prices(Settings(data=data).fal_prices_toml)
        lines = usage.read(db, user_id, Period(today - timedelta(days=days - 1), today), prices)
    if as_csv:
        typer.echo(usage.as_csv(lines), nl=False)
    else:
        show([asdict(line) for line in lines], COLUMNS)


def list_acts(limit: int = 30, data: Data = DATA) -> None:
    """What admins did, the newest first."""
    with changing(data) as db:
        rows = audit.entries(db, None, limit)
    for row in rows:
        row["at"] = iso(row["created_at"])
    show(rows, ["at", "actor", "act", "subject", "detail"])


def _day(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()
