"""Backup and restore; damaged, newer and locked databases; full disks."""

import contextlib
import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.accounts import ledger, users
from server.cli import doctor
from server.cli.common import lock_data
from server.cli.main import app
from server.db import backup
from server.db.database import Connection, Database, DatabaseUnusable, database_error_response
from server.db.migrations import migrations
from server.jobs.job import NewJob
from server.jobs.store import JobStore
from server.settings import Settings

NOW = 1_790_000_000.0
STEPS = [step.name for step in migrations.pending(Connection(memory=True))]


def new_job(user: str, number: int) -> NewJob:
    return NewJob(f"j{number}", user, None, "image", "m", "text-to-image", {}, 1, f"{number:048x}.png", 1)


def installed_models(data: Path, jobs: int = 3) -> tuple[Settings, str]:
    """A data folder with some succeeded jobs and their files."""
    settings = Settings(data=data)
    store = JobStore(Database(settings.database))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    ledger.grant(store.db, user, 10_000, "test", NOW)
    settings.files.mkdir()
    for number in range(jobs):
        finish(store, settings, user, number)
    store.database.close()
    return settings, user


def finish(store: JobStore, settings: Settings, user: str, number: int) -> None:
    store.insert(new_job(user, number), NOW)
    store.start(f"j{number}", "cpu", NOW)
    (settings.files / f"{number:048x}.png").touch()
    store.succeed(f"j{number}", {}, NOW)


def test_a_backup_is_a_consistent_snapshot_and_can_be_restored(tmp_path: Path):
    settings, _ = installed_models(tmp_path / "data")
    taken = backup.back_up(settings.database, settings.files, tmp_path / "copy")
    assert (taken.jobs, len(taken.files), taken.missing) == (3, 3, ())
    assert backup.file_list_path(tmp_path / "copy").read_text().split() == list(taken.files)
    settings.database.write_bytes(b"ruined")
    backup.restore(tmp_path / "copy", settings.database, settings.files)
    store = JobStore(Database(settings.database))
    assert [job.id for job in store.jobs(None, None, 9)] == ["j2", "j1", "j0"]
    store.database.close()
    assert (tmp_path / "data/plantain.sqlite.before-restore").read_bytes() == b"ruined"


def test_a_backup_under_load_adds_up(tmp_path: Path):
    """While jobs are submitted and finish, the ledger of every copy adds up."""
    settings, user = installed_models(tmp_path / "data")
    busy = threading.Event()

    def work() -> None:
        store = JobStore(Database(settings.database))
        for number in range(3, 10_000):
            if busy.is_set():
                break
            finish(store, settings, user, number)
        store.database.close()

    thread = threading.Thread(target=work)
    thread.start()
    for index in range(5):
        taken = backup.back_up(settings.database, settings.files, tmp_path / f"copy{index}")
        with contextlib.closing(sqlite3.connect(tmp_path / f"copy{index}")) as db:
            balance, total, charges = db.execute(
                "SELECT (SELECT balance FROM user), (SELECT sum(amount) FROM ledger),"
                " (SELECT count(*) FROM ledger WHERE kind = 'charge')"
            ).fetchone()
        assert (balance, charges, taken.missing) == (total, taken.jobs, ())
        time.sleep(0.05)
    busy.set()
    thread.join()
    assert taken.jobs > 3


def test_a_damaged_copy_is_not_restored(tmp_path: Path):
    settings, _ = installed_models(tmp_path / "data")
    (tmp_path / "copy").write_bytes(b"x" * 10_000)
    with pytest.raises(DatabaseUnusable, match="damaged"):
        backup.restore(tmp_path / "copy", settings.database, settings.files)
    assert JobStore(Database(settings.database)).job("j1").status == "succeeded"


@pytest.mark.parametrize("step", STEPS)
def test_a_database_of_every_earlier_schema_is_migrated(tmp_path: Path, step: str):
    path = tmp_path / "old.sqlite"
    old = Connection(path)
    migrations.apply(old, stop_before=step)
    old.close()
    store = JobStore(Database(path))
    assert [each.name for each in migrations.applied(store.db)] == STEPS or step
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    assert store.insert(new_job(user, 1), NOW)[0].status == "queued"
    store.database.close()


def test_jobs_of_the_first_schema_survive_the_migrations(tmp_path: Path):
    path = tmp_path / "old.sqlite"
    old = Connection(path)
    migrations.apply(old, stop_before="0002_auth")
    old.execute("INSERT INTO user (id, name, email, createdAt, updatedAt, balance) VALUES ('u', 'A', 'a@b', '', '', 4)")
    old.execute(
        "INSERT INTO job (id, user_id, kind, model, workflow, status, params, pixels, output_name, credits, created_at)"
        " VALUES ('j', 'u', 'image', 'm', 'text-to-image', 'queued', '{}', 1, 'x.png', 2, 5)"
    )
    old.conn.commit()
    old.close()
    store = JobStore(Database(path))
    job = store.job("j")
    assert (job.status, job.priority, job.weight, job.predicted_start_at) == ("queued", 0, 1.0, None)
    store.database.close()


def test_a_newer_database_is_refused_and_unchanged(tmp_path: Path):
    settings, _ = installed_models(tmp_path)
    with sqlite3.connect(settings.database) as db:
        db.execute("INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('plantain', '9999_x', '')")
    before = settings.database.read_bytes()
    with pytest.raises(DatabaseUnusable, match=r"written by a newer Plantain \(9999_x\)"):
        JobStore(Database(settings.database))
    assert settings.database.read_bytes() == before
    assert ("bad", True) in [(state, "newer" in text) for state, text in doctor.database(settings)]


def test_a_file_that_is_no_database_is_refused_and_named(tmp_path: Path):
    settings = Settings(data=tmp_path)
    settings.database.write_bytes(b"not a database at all" * 100)
    with pytest.raises(DatabaseUnusable, match=r"damaged.*plantain restore"):
        JobStore(Database(settings.database))
    assert [state for state, _ in doctor.database(settings)] == ["bad"]


def test_a_page_of_rubbish_in_the_middle_is_named(tmp_path: Path):
    settings, _ = installed_models(tmp_path, jobs=40)
    with settings.database.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(8 * 4096))
    said = list(doctor.database(settings))
    assert any(state == "bad" and "damaged" in text for state, text in said), said


def test_a_database_that_another_process_holds_is_named(tmp_path: Path):
    settings, _ = installed_models(tmp_path)
    other = sqlite3.connect(settings.database)
    other.execute("BEGIN IMMEDIATE")
    assert list(doctor.database(settings))[-1][1].startswith("the database is locked by another process")
    other.close()
    assert [state for state, _ in doctor.database(settings, NOW)] == ["ok", "ok"]


def test_a_clock_set_back_and_files_that_are_gone_are_named(tmp_path: Path):
    settings, _ = installed_models(tmp_path)
    (settings.files / f"{1:048x}.png").unlink()
    said = [text for state, text in doctor.database(settings, NOW - 3600) if state == "note"]
    assert said[0] == "the clock was set back: the newest job is 3600 s in the future"
    assert said[1].startswith("1 of 3 files are missing")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [("database or disk is full", 507, "STORAGE_FULL"), ("database is locked", 503, "UNAVAILABLE")],
)
def test_database_errors_in_the_envelope(error: str, status: int, code: str):
    told = database_error_response(sqlite3.OperationalError(error))
    assert (told.status, told.code) == (status, code)


def test_a_full_disk_loses_nothing(tmp_path: Path):
    """A full disk is simulated by SQLite's own limit of the file size."""
    settings, user = installed_models(tmp_path)
    store = JobStore(Database(settings.database))
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    number = 10
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for number in range(10, 10_000):
            store.insert(new_job(user, number), NOW)
    taken = len(store.jobs(None, None, 10_000))
    charges = store.db.execute("SELECT count(*) FROM ledger WHERE kind = 'charge'").fetchone()[0]
    assert taken == charges == number - 10 + 3, "the job that did not fit was not charged"
    store.db.execute("PRAGMA max_page_count = 1000000")
    assert store.insert(new_job(user, number), NOW)[0].id == f"j{number}"
    store.database.close()


def plantain(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def test_backup_and_restore_at_the_command_line(tmp_path: Path):
    settings, _ = installed_models(tmp_path / "data")
    code, told = plantain("backup", tmp_path / "copy", "--data", settings.data)
    assert (code, "3 jobs, 3 files" in told, "rsync -a --files-from=" in told) == (0, True, True)
    (settings.files / f"{1:048x}.png").unlink()
    code, told = plantain("restore", tmp_path / "copy", "--data", settings.data)
    assert code == 0 and "1 of them missing" in told
    (tmp_path / "copy").write_bytes(b"rubbish" * 999)
    assert plantain("restore", tmp_path / "copy", "--data", settings.data)[0] == 1


def test_nothing_is_restored_under_a_running_server(tmp_path: Path):
    settings, _ = installed_models(tmp_path / "data")
    plantain("backup", tmp_path / "copy", "--data", settings.data)
    lock = lock_data(settings.data)
    code, told = plantain("restore", tmp_path / "copy", "--data", settings.data)
    lock.close()
    assert (code, "Another server is using" in told) == (1, True)


def test_a_data_folder_that_cannot_be_written_is_reported(tmp_path: Path):
    (tmp_path / "file").touch()
    code, told = plantain("serve", "--data", tmp_path / "file" / "data")
    assert code == 1 and "the data folder cannot be written" in told
    with pytest.raises(DatabaseUnusable, match="cannot be written"):
        JobStore(Database(tmp_path / "file" / "data" / "plantain.sqlite"))


def test_a_damaged_database_is_one_line_at_the_command_line(tmp_path: Path):
    Settings(data=tmp_path).database.write_bytes(b"rubbish" * 999)
    code, told = plantain("users", "list", "--data", tmp_path)
    assert code == 1 and "plantain restore FILE" in told and "Traceback" not in told


def test_the_start_prediction_error_at_the_command_line(tmp_path: Path):
    settings, _ = installed_models(tmp_path / "data")
    with contextlib.closing(sqlite3.connect(settings.database)) as db:
        db.execute("UPDATE job SET promised_start_at = started_at - 3")
        db.commit()
    code, told = plantain("jobs", "--prediction-error", "--data", settings.data)
    assert code == 0 and "3.0" in told
