"""Online backup and restore of the database. A backup is a consistent snapshot; writers need not stop for it."""

import os
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlite_utils import Database

from server.db.database import DatabaseUnusable, explain_database_error, refuse_newer


@dataclass(frozen=True)
class BackupSummary:
    """The number of jobs and the names of files in a copy; `missing` are the names that are not in the folder."""

    jobs: int
    files: tuple[str, ...]
    missing: tuple[str, ...]


def back_up(database: Path, files: Path, to: Path) -> BackupSummary:
    """Writes the copy to `to`, and the list of its files to `to` plus `.files`. Raises DatabaseUnusable.

    The database is copied first: the files it names are complete and never change, so they may be copied later.
    """
    part = to.with_name(f".{to.name}.part")
    try:
        source = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        with closing(source), closing(sqlite3.connect(part)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a WAL
        summary = check(part, files)
        with part.open("rb") as copied:
            os.fsync(copied.fileno())
        part.replace(to)
    except (sqlite3.DatabaseError, OSError) as error:
        raise DatabaseUnusable(f"{database}: {explain_database_error(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    file_list_path(to).write_text("".join(f"{name}\n" for name in summary.files))
    return summary


def restore(copy: Path, database: Path, files: Path) -> BackupSummary:
    """Replaces the database with the copy, and keeps the old one as `….before-restore`.

    Raises DatabaseUnusable for a copy that is damaged or from a newer version. No server may be running.
    """
    summary = check(copy, files)
    database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = database.with_name(f".{database.name}.part")
    shutil.copyfile(copy, part)
    with part.open("rb") as copied:
        os.fsync(copied.fileno())
    for suffix in ("", "-wal", "-shm"):
        old = database.with_name(database.name + suffix)
        if old.exists():
            old.replace(database.with_name(f"{database.name}.before-restore{suffix}"))
    part.replace(database)
    return summary


def check(path: Path, files: Path) -> BackupSummary:
    """Reads a whole copy. Raises DatabaseUnusable."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            db = Database(connection)
            problems = [row[0] for row in db.execute("PRAGMA integrity_check(5)").fetchall()]
            if problems != ["ok"]:
                raise DatabaseUnusable(f"{path} is damaged: {'; '.join(problems)}")
            refuse_newer(db, path)
            names = tuple(row[0] for row in db.execute("SELECT name FROM file ORDER BY name").fetchall())
            jobs = db.execute("SELECT count(*) FROM job").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise DatabaseUnusable(f"{path}: {explain_database_error(error)}") from error
    return BackupSummary(jobs, names, missing(names, files))


def missing(names: Iterable[str], files: Path) -> tuple[str, ...]:
    """The names that are not in the folder."""
    return tuple(name for name in names if not (files / name).exists())


def file_list_path(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.files")
