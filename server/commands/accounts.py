"""`plantain users`, `plantain keys`, `plantain credits`: straight on the database, with the server up or down."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from sqlite_utils import Database

from server import accounts, acts, audit, ledger
from server.acts import Acting
from server.clock import iso
from server.errors import PlantainError
from server.plans import Plans
from server.settings import Settings, SettingsError
from server.store import Store

Data = Annotated[Path, typer.Option("--data", envvar="PLANTAIN_DATA", help="The server's data folder.")]
Email = Annotated[str, typer.Option("--user", help="The user's e-mail address.")]
Role = Literal["user", "admin"]
DATA = Path("data")
OWNER = "owner@localhost"
DAY_S = 86_400.0

users = typer.Typer(no_args_is_help=True, help="Who may call.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
credits_ = typer.Typer(no_args_is_help=True, help="What calls cost.")


def register(app: typer.Typer) -> None:
    app.add_typer(users, name="users")
    app.add_typer(keys, name="keys")
    app.add_typer(credits_, name="credits")


@users.command("create")
def create_user(email: str, name: str = "", plan: str = "free", role: Role = "user", data: Data = DATA) -> None:
    """Add a user, with the sign-up credits, and print their first API key."""
    with acting(data) as it:
        user_id = acts.create_user(it, email, name, plan=plans(data).known(plan), role=role)
        typer.echo(acts.create_key(it, user_id, "first")[1])


@users.command("list")
def list_users(data: Data = DATA) -> None:
    """All users with their balances."""
    with changing(data) as db:
        rows = list(db.query("SELECT *, iif(banned, 'banned', '') AS ban FROM user ORDER BY createdAt"))
    show(rows, ["email", "name", "role", "plan", "balance", "ban", "createdAt"])


@users.command("change")
def change_user(
    email: str, plan: str | None = None, role: Annotated[Role | None, typer.Option()] = None, data: Data = DATA
) -> None:
    """Give a user another plan or role."""
    with acting(data) as it:
        changes = {"plan": plan and plans(data).known(plan), "role": role}
        user_id = accounts.user_by_email(it.db, email)
        acts.change_user(it, user_id, **{name: value for name, value in changes.items() if value})


@users.command("ban")
def ban_user(email: str, reason: str | None = None, data: Data = DATA) -> None:
    """Their sessions end and their keys open nothing, at once."""
    with acting(data) as it:
        acts.ban(it, accounts.user_by_email(it.db, email), reason)


@users.command("unban")
def unban_user(email: str, data: Data = DATA) -> None:
    """Let a user in again."""
    with acting(data) as it:
        acts.unban(it, accounts.user_by_email(it.db, email))


@keys.command("create")
def create_key(
    user: Email = OWNER,
    name: str | None = None,
    scope: Annotated[list[str] | None, typer.Option(help="generate, read or admin; repeatable. [all]")] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute, beside the plan's.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Until it expires. [never]")] = None,
    data: Data = DATA,
) -> None:
    """Make a key and print it: it cannot be shown again."""
    with acting(data) as it:
        user_id = accounts.user_by_email(it.db, user)
        expires_at = None if days is None else it.now + days * DAY_S
        typer.echo(acts.create_key(it, user_id, name, expires_at=expires_at, scopes=scope, per_minute=per_minute)[1])


@keys.command("list")
def list_keys(data: Data = DATA) -> None:
    """All keys, by their first letters."""
    with changing(data) as db:
        rows = accounts.keys(db)
    for row in rows:
        row["works"] = "yes" if row["enabled"] else "revoked"
        row["scopes"] = " ".join(sorted(accounts.scopes_of(row["permissions"]) or ()))
        row["a minute"] = row["rateLimitMax"] if row["rateLimitEnabled"] else None
    show(rows, ["id", "email", "name", "start", "works", "scopes", "a minute", "lastRequest", "expiresAt", "createdAt"])


@keys.command("revoke")
def revoke_key(key_id: str, data: Data = DATA) -> None:
    """The key stops working at once."""
    with acting(data) as it:
        acts.revoke_key(it, key_id)


@credits_.command("grant")
def grant(amount: int, user: Email = OWNER, note: str = "granted", data: Data = DATA) -> None:
    """Give credits (a negative number takes them back) and print the new balance."""
    with acting(data) as it:
        typer.echo(acts.grant(it, accounts.user_by_email(it.db, user), amount, note))


@credits_.command("ledger")
def show_ledger(user: Email = OWNER, limit: int = 30, data: Data = DATA) -> None:
    """What a user was given, paid and got back, the newest first."""
    with changing(data) as db:
        rows = ledger.entries(db, accounts.user_by_email(db, user), None, limit)
    for row in rows:
        row["at"] = iso(row["created_at"])
    show(rows, ["id", "kind", "amount", "balance", "job_id", "note", "at"])


@contextmanager
def changing(data: Path) -> Iterator[Database]:
    """The database in one transaction; what goes wrong is one line for a person."""
    settings = Settings(data=data)
    if not settings.database.exists():
        raise typer.BadParameter(f"there is no database in {data}: start the server once, or give --data")
    try:
        store = Store(settings.database)
        try:
            with store.atomic() as db:
                yield db
        finally:
            store.close()
    except (PlantainError, SettingsError) as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None


@contextmanager
def acting(data: Path) -> Iterator[Acting]:
    """As `changing`, for what is written into the audit log."""
    with changing(data) as db:
        yield Acting(db, audit.COMMAND_LINE, time.time())


def plans(data: Path) -> Plans:
    return Plans.load(Settings(data=data).plans_toml)


def show(rows: list[dict[str, object]], columns: list[str]) -> None:
    """A table for a person."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    Console().print(table)
