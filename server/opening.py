"""Opening the database, with every step of its schema; or an error that says why not."""

import sqlite3
from pathlib import Path

from sqlite_utils import Database

from server.errors import PlantainError, StorageFull, Unavailable
from server.migrations import migrations
from server.settings import SettingsError

BUSY_TIMEOUT_S = 5.0
BUSY_RETRY_S = 5
DAMAGED = "not a database", "malformed"
CLOSED = "readonly", "unable to open", "Read-only", "No such file", "Not a directory"


class DatabaseUnusable(SettingsError):
    """The message says what is wrong with the file and what to do about it."""


def open_database(path: Path) -> Database:
    """Raises DatabaseUnusable; the file is then as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = Database(sqlite3.connect(path, check_same_thread=False, timeout=BUSY_TIMEOUT_S))
        refuse_newer(db, path)
        db.enable_wal()
        db.execute("PRAGMA synchronous = FULL")  # a job that was answered for survives a power cut
        db.execute("PRAGMA foreign_keys = ON")
        migrations.apply(db)
    except (sqlite3.DatabaseError, OSError) as error:
        raise DatabaseUnusable(f"{path}: {advice(error)}") from error
    return db


def refuse_newer(db: Database, path: Path) -> None:
    """A database that has steps of the schema which this server does not know is left alone."""
    known = {step.name for step in migrations.pending(Database(memory=True))}
    if unknown := {step.name for step in migrations.applied(db)} - known:
        raise DatabaseUnusable(
            f"{path} was written by a newer Plantain ({', '.join(sorted(unknown))}). "
            "Start that version, or restore a backup from before it."
        )


def advice(error: Exception) -> str:
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


def as_told(error: sqlite3.DatabaseError) -> PlantainError:
    """The same for a caller."""
    if "full" in str(error):
        return StorageFull("The server's disk is full.")
    if "locked" in str(error):
        return Unavailable("The database is busy.", headers={"Retry-After": str(BUSY_RETRY_S)})
    return Unavailable("The database cannot be used; the server's log says why, and so does plantain doctor.")
