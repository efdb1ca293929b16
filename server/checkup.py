"""What `plantain doctor` says about the database and the files that belong with it. Changes nothing."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

from sqlite_utils import Database

from server.backup import missing
from server.opening import DatabaseUnusable, advice, refuse_newer
from server.settings import Settings

Said = tuple[Literal["ok", "note", "bad"], str]

PATIENCE_S = 2.0
CLOCK_SLACK_S = 60.0


def database(settings: Settings, now: float | None = None) -> Iterator[Said]:
    """Each line with how bad it is."""
    if not settings.database.exists():
        yield "note", f"there is none yet in {settings.data}: the first start makes it"
        return
    try:
        with closing(sqlite3.connect(settings.database, timeout=PATIENCE_S)) as connection:
            yield from _whole(Database(connection), settings.database)
            yield from _writable(connection)
            yield from _clock(connection, time.time() if now is None else now)
            yield from _files(connection, settings.files)
    except (sqlite3.DatabaseError, DatabaseUnusable) as error:
        yield "bad", str(error) if isinstance(error, DatabaseUnusable) else advice(error)


def _whole(db: Database, path: Path) -> Iterator[Said]:
    refuse_newer(db, path)
    problems = [row[0] for row in db.execute("PRAGMA integrity_check(5)").fetchall()]
    if problems != ["ok"]:
        yield "bad", f"damaged: {'; '.join(problems)}. Restore a backup: plantain restore FILE"
    waiting, running = db.execute(
        "SELECT sum(status = 'queued'), sum(status = 'running') FROM job WHERE status IN ('queued', 'running')"
    ).fetchone()
    yield "ok", f"{path.name} is whole; {waiting or 0} jobs wait, {running or 0} run"


def _writable(connection: sqlite3.Connection) -> Iterator[Said]:
    """Takes the write lock and gives it back."""
    connection.execute("BEGIN IMMEDIATE")
    connection.rollback()
    yield "ok", "it can be written"


def _clock(connection: sqlite3.Connection, now: float) -> Iterator[Said]:
    (newest_at,) = connection.execute("SELECT max(max(created_at), max(coalesce(finished_at, 0))) FROM job").fetchone()
    if newest_at and newest_at > now + CLOCK_SLACK_S:
        yield "note", f"the clock was set back: the newest job is {newest_at - now:.0f} s in the future"


def _files(connection: sqlite3.Connection, files: Path) -> Iterator[Said]:
    names = [row[0] for row in connection.execute("SELECT name FROM file").fetchall()]
    if gone := missing(names, files):
        yield "note", f"{len(gone)} of {len(names)} files are missing in {files}, {gone[0]} for one"
