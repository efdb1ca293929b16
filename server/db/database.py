"""The SQLite database: opening and migrating it, transactions, and calls off the event loop."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from sqlite_utils import Database as Connection

from server.db.migrations import migrations
from server.errors import PlantainError, StorageFull, Unavailable
from server.settings import SettingsError

log = logging.getLogger("plantain.database")
P = ParamSpec("P")
T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
BUSY_RETRY_S = 5
DAMAGED = "not a database", "malformed"
CLOSED = "readonly", "unable to open", "Read-only", "No such file", "Not a directory"


class DatabaseUnusable(SettingsError):
    """The message says what is wrong with the file and what to do about it."""


def open_database(path: Path) -> Connection:
    """Raises DatabaseUnusable; the file is then as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = Connection(sqlite3.connect(path, check_same_thread=False, timeout=BUSY_TIMEOUT_S))
        refuse_newer(db, path)
        db.enable_wal()
        db.execute("PRAGMA synchronous = FULL")  # a job that was answered for survives a power cut
        db.execute("PRAGMA foreign_keys = ON")
        migrations.apply(db)
    except (sqlite3.DatabaseError, OSError) as error:
        raise DatabaseUnusable(f"{path}: {explain_database_error(error)}") from error
    return db


def refuse_newer(db: Connection, path: Path) -> None:
    """A database that has steps of the schema which this server does not know is left alone."""
    known = {step.name for step in migrations.pending(Connection(memory=True))}
    if unknown := {step.name for step in migrations.applied(db)} - known:
        raise DatabaseUnusable(
            f"{path} was written by a newer Plantain ({', '.join(sorted(unknown))}). "
            "Start that version, or restore a backup from before it."
        )


def explain_database_error(error: Exception) -> str:
    """What is wrong with the database, and what helps."""
    text = str(error)
    if any(word in text for word in DAMAGED):
        return f"the database is damaged ({text}). Restore a backup: plantain restore FILE"
    if "locked" in text:
        return "the database is locked by another process that writes to it. Which one: fuser FILE"
    if isinstance(error, PermissionError) or any(word in text for word in CLOSED):
        return f"the data folder cannot be written ({text}). Check its owner, and how its disk is mounted"
    if "full" in text or "No space" in text:
        return "the disk is full. Free some space; nothing is lost meanwhile"
    return text


def database_error_response(error: sqlite3.DatabaseError) -> PlantainError:
    """The same for a caller."""
    if "full" in str(error):
        return StorageFull("The server's disk is full.")
    if "locked" in str(error):
        return Unavailable("The database is busy.", headers={"Retry-After": str(BUSY_RETRY_S)})
    return Unavailable("The database cannot be used; the server's log says why, and so does plantain doctor.")


WRITE_RETRY_S = 1.0


class Database:
    """One SQLite file, open. Raises DatabaseUnusable.

    All calls of this process run on one thread, one after the other: one writer, no locks. Functions that take the
    connection block; from the event loop they go through `run`, `transaction`, `call` or `write`.
    """

    def __init__(self, path: Path) -> None:
        self.db = open_database(path)
        self.write_error: str | None = None
        """Why nothing can be written at the moment, for a person."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking function off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def run(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of the connection off the event loop, in no transaction of its own."""
        return await self.call(lambda: function(self.db, *args, **kwargs))

    async def transaction(
        self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function of the connection in one transaction: all of its changes or, if it raises, none."""
        return await self.call(self._in_transaction, lambda db: function(db, *args, **kwargs))

    async def write_transaction(
        self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`transaction`, retried as `write` is."""
        return await self.write(self._in_transaction, lambda db: function(db, *args, **kwargs))

    def _in_transaction(self, function: Callable[[Connection], T]) -> T:
        with self.atomic() as db:
            return function(db)

    async def write(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call`, retried until the row is stored: a full disk or a locked database delays, and loses nothing."""
        while True:
            try:
                result = await self.call(method, *args, **kwargs)
            except sqlite3.OperationalError as error:
                self.write_error = f"the database cannot be written: {error}"
                log.error("%s", self.write_error)
                await asyncio.sleep(WRITE_RETRY_S)
            else:
                self.write_error = None
                return result

    @contextmanager
    def atomic(self) -> Iterator[Connection]:
        """A transaction that takes the write lock at its start, so that what it reads still holds when it writes."""
        try:
            self.db.conn.execute("BEGIN IMMEDIATE")  # in here: it can break off with the transaction open
            yield self.db
            self.db.conn.execute("COMMIT")
        except BaseException:
            self.db.rollback()
            raise

    def close(self) -> None:
        self._thread.shutdown()
        self.db.close()
