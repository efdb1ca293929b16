"""Shared by the commands: the data folder and its lock, the database, tables and errors on the console."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.accounts import admin
from server.accounts.admin import AdminContext
from server.db.database import Connection, Database, explain_database_error
from server.errors import PlantainError
from server.settings import Settings, SettingsError

Data = Annotated[Path, typer.Option("--data", envvar="PLANTAIN_DATA", help="The server's data folder.")]
Email = Annotated[str, typer.Option("--user", help="The user's e-mail address.")]
DATA = Path("data")


@contextmanager
def open_database(data: Path) -> Iterator[Connection]:
    """The database, in one transaction. Errors end the command with one line on standard error."""
    settings = Settings(data=data)
    if not settings.database.exists():
        raise typer.BadParameter(f"there is no database in {data}: start the server once, or give --data")
    try:
        database = Database(settings.database)
        try:
            with database.atomic() as db:
                yield db
        finally:
            database.close()
    except (PlantainError, SettingsError) as error:
        raise typer.Exit(print_error(error)) from None


@contextmanager
def admin_context(data: Path) -> Iterator[AdminContext]:
    """As `open_database`, for admin actions: they are recorded in the audit log."""
    with open_database(data) as db:
        yield AdminContext(db, admin.COMMAND_LINE, time.time())


def print_table(rows: list[dict[str, object]], columns: list[str]) -> None:
    """Prints rows as a table. Columns that are None, or that a row does not have, are empty."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    Console(markup=False).print(table)  # a cell may hold square brackets


def lock_data(data: Path) -> IO[str]:
    """Locks the data folder for this process: two servers on one queue would run its jobs twice."""
    try:  # the folder holds keys, sessions and images: not for other users of this machine
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (data / "lock").open("a+")
    except OSError as error:
        raise typer.Exit(print_error(f"{data}: {explain_database_error(error)}")) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise typer.Exit(print_error(f"Another server is using {data}.")) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def print_error(error: object) -> int:
    """Prints a message on standard error and returns the exit status 1."""
    Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
    return 1
