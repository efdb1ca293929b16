"""`plantain users`, `plantain keys`, `plantain credits`: straight on the database, with the server up or down."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from sqlite_utils import Database

from server import accounts, ledger
from server.errors import PlantainError
from server.settings import Settings
from server.store import Store

Data = Annotated[Path, typer.Option("--data", envvar="PLANTAIN_DATA", help="The server's data folder.")]
Email = Annotated[str, typer.Option("--user", help="The user's e-mail address.")]
OWNER = "owner@localhost"

users = typer.Typer(no_args_is_help=True, help="Who may call.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
credits_ = typer.Typer(no_args_is_help=True, help="What calls cost.")


def register(app: typer.Typer) -> None:
    app.add_typer(users, name="users")
    app.add_typer(keys, name="keys")
    app.add_typer(credits_, name="credits")


@users.command("create")
def create_user(email: str, name: str = "", plan: str = "free", data: Data = Path("data")) -> None:
    """Add a user, with the sign-up credits, and print their first API key."""
    with changing(data) as db:
        user_id = accounts.create_user(db, name or email, email, time.time(), plan=plan)
        typer.echo(accounts.create_key(db, user_id, "first", time.time()))


@users.command("list")
def list_users(data: Data = Path("data")) -> None:
    """All users with their balances."""
    with changing(data) as db:
        rows = list(db.query("SELECT email, name, role, plan, balance, createdAt FROM user ORDER BY createdAt"))
    show(rows, ["email", "name", "role", "plan", "balance", "createdAt"])


@keys.command("create")
def create_key(user: Email = OWNER, name: str | None = None, data: Data = Path("data")) -> None:
    """Make a key and print it: it cannot be shown again."""
    with changing(data) as db:
        typer.echo(accounts.create_key(db, accounts.user_by_email(db, user), name, time.time()))


@keys.command("list")
def list_keys(data: Data = Path("data")) -> None:
    """All keys, by their first letters."""
    with changing(data) as db:
        rows = accounts.keys(db)
    for row in rows:
        row["works"] = "yes" if row["enabled"] else "revoked"
    show(rows, ["id", "email", "name", "start", "works", "lastRequest", "createdAt"])


@keys.command("revoke")
def revoke_key(key_id: str, data: Data = Path("data")) -> None:
    """The key stops working at once."""
    with changing(data) as db:
        accounts.revoke_key(db, key_id, time.time())


@credits_.command("grant")
def grant(amount: int, user: Email = OWNER, note: str = "granted", data: Data = Path("data")) -> None:
    """Give credits (a negative number takes them back) and print the new balance."""
    with changing(data) as db:
        typer.echo(ledger.grant(db, accounts.user_by_email(db, user), amount, note, time.time()))


@contextmanager
def changing(data: Path) -> Iterator[Database]:
    """The database in one transaction; what goes wrong is one line for a person."""
    settings = Settings(data=data)
    if not settings.database.exists():
        raise typer.BadParameter(f"there is no database in {data}: start the server once, or give --data")
    store = Store(settings.database)
    try:
        with store.atomic() as db:
            yield db
    except PlantainError as error:
        Console(stderr=True).print(f"[red]{error.message}[/red]")
        raise typer.Exit(1) from None
    finally:
        store.close()


def show(rows: list[dict[str, object]], columns: list[str]) -> None:
    """A table for a person."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    Console().print(table)
