"""The SQLite database: opens and migrates it; runs calls and transactions off the event loop, with retries."""

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
WRITE_RETRY_S = 1.0
DAMAGED_TEXTS = "not a database", "malformed"
UNWRITABLE_TEXTS = "readonly", "unable to open", "Read-only", "No such file", "Not a directory"


class DatabaseUnusable(SettingsError):
    """The message says what is wrong with the file and what to do about it."""


class Database:
    """An open SQLite file. Raises DatabaseUnusable.

    All calls run one after another on one thread: one writer, no locks. Functions of the connection block, so the
    event loop calls them through `run`, `transaction`, `call`, `write` or `write_transaction`.
    """

    def __init__(self, path: Path) -> None:
        self.db = open_database(path)
        self.write_error: str | None = None
        """Why writes fail at the moment, for people; None if they succeed."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking function on the database thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def run(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function of the connection on the database thread, without a transaction."""
        return await self.call(lambda: function(self.db, *args, **kwargs))

    async def transaction(
        self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a function of the connection in one transaction, which is rolled back if it raises."""
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
        """`call`, retried every second until it succeeds: a full disk or a locked database delays and loses nothing."""
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
        """A transaction that takes the write lock at its start, so that what it reads is still true when it writes."""
        try:
            self.db.conn.execute("BEGIN IMMEDIATE")  # inside `try`: an interrupt can leave the transaction open
            yield self.db
            self.db.conn.execute("COMMIT")
        except BaseException:
            self.db.rollback()
            raise

    def close(self) -> None:
        self._thread.shutdown()
        self.db.close()


def open_database(path: Path) -> Connection:
    """Opens and migrates the file. Raises DatabaseUnusable, and then leaves the file unchanged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = Connection(sqlite3.connect(path, check_same_thread=False, timeout=BUSY_TIMEOUT_S))
        refuse_newer(db, path)
        db.enable_wal()
        db.execute("PRAGMA synchronous = FULL")  # an accepted job survives a power failure
        db.execute("PRAGMA foreign_keys = ON")
        migrations.apply(db)
    except (sqlite3.DatabaseError, OSError) as error:
        raise DatabaseUnusable(f"{path}: {explain_database_error(error)}") from error
    return db


def refuse_newer(db: Connection, path: Path) -> None:
    """Raises DatabaseUnusable for a schema with migrations that this version does not know."""
    known = {step.name for step in migrations.pending(Connection(memory=True))}
    if unknown := {step.name for step in migrations.applied(db)} - known:
        raise DatabaseUnusable(
            f"{path} was written by a newer Plantain ({', '.join(sorted(unknown))}). "
            "Start that version, or restore a backup from before it."
        )


def explain_database_error(error: Exception) -> str:
    """What is wrong with the database, and what the operator can do."""
    text = str(error)
    if any(word in text for word in DAMAGED_TEXTS):
        return f"the database is damaged ({text}). Restore a backup: plantain restore FILE"
    if "locked" in text:
        return "the database is locked by another process that writes to it. Which one: fuser FILE"
    if isinstance(error, PermissionError) or any(word in text for word in UNWRITABLE_TEXTS):
        return f"the data folder cannot be written ({text}). Check its owner and how its disk is mounted"
    if "full" in text or "No space" in text:
        return "the disk is full. Free some space; nothing is lost until then"
    return text


def database_error_response(error: sqlite3.DatabaseError) -> PlantainError:
    """The error that a caller sees."""
    if "full" in str(error):
        return StorageFull("The server's disk is full.")
    if "locked" in str(error):
        return Unavailable("The database is busy.", headers={"Retry-After": str(BUSY_RETRY_S)})
    return Unavailable("The database cannot be used; the server's log says why, and so does plantain doctor.")
