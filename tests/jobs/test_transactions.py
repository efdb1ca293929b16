"""Credits under failures: interrupted statements, concurrent writers, killed processes."""

import contextlib
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.accounts import ledger, users
from server.db.database import Database
from server.errors import ConcurrencyLimit, InsufficientCredits
from server.jobs.idempotency import KeyAlreadyClaimed
from server.jobs.job import IdempotencyClaim, NewJob
from server.jobs.store import JobStore

NOW = 1_790_000_000.0
REFUSED = (InsufficientCredits, ConcurrencyLimit, KeyAlreadyClaimed, sqlite3.IntegrityError)
ACTS = ["insert", "start", "succeed", "fail", "cancel", "requeue", "recover"]
STEPS = st.lists(st.tuples(st.sampled_from(ACTS), st.integers(1, 5), st.integers(4, 400)), max_size=30)
"""The step, its job, and the number of SQLite instructions after which it is interrupted, within the transaction."""


def act(store: JobStore, user: str, step: str, number: int) -> None:
    """One step of a job; an invalid one is refused."""
    job_id = f"job_{number}"
    try:
        match step:
            case "insert":
                store.insert(new_job(user, number), NOW)
            case "start":
                store.start(job_id, "cpu", NOW)
            case "succeed":
                store.succeed(job_id, {}, NOW)
            case "fail":
                store.fail(job_id, {}, NOW)
            case "recover":
                store.requeue_interrupted(NOW)
            case _:
                getattr(store, step)(job_id, NOW)
    except REFUSED:
        pass


def new_job(user: str, number: int) -> NewJob:
    """Each costs 3. Odd ones have an Idempotency-Key, which two numbers share."""
    claim = IdempotencyClaim("/generate", f"key {number % 8}", "hash") if number % 2 else None
    return NewJob(
        id=f"job_{number}",
        user_id=user,
        key_id=None,
        kind="image",
        model="plain",
        workflow="text-to-image",
        params={},
        pixels=64,
        output_name=f"{number}.png",
        credits=3,
        max_concurrent_jobs=3,
        idempotency=claim,
    )


def check_books(store: JobStore, user: str) -> None:
    """The ledger adds up, no balance is negative, each charge is refunded at most once."""
    entries = ledger.entries(store.db, user, None, 10**6)
    assert ledger.balance(store.db, user) == sum(entry["amount"] for entry in entries) >= 0
    assert all(entry["balance"] >= 0 for entry in entries)
    jobs = store.jobs(user, None, 10**6)
    kinds = {(entry["job_id"], entry["kind"]): entry["amount"] for entry in entries if entry["job_id"]}
    assert len(kinds) == sum(1 for entry in entries if entry["job_id"])
    given_back = {job.id for job in jobs if job.status in ("failed", "cancelled")}
    assert {job_id for job_id, kind in kinds if kind == "charge"} == {job.id for job in jobs}
    assert {job_id for job_id, kind in kinds if kind == "refund"} == given_back
    assert all(kinds[job.id, "charge"] == -job.credits for job in jobs)
    assert all(kinds[job_id, "refund"] == -kinds[job_id, "charge"] for job_id in given_back)
    assert sum(not job.is_final for job in jobs) <= 3
    keys = [row["job_id"] for row in store.db.query("SELECT job_id FROM idempotency")]
    assert set(keys) == {job.id for job in jobs if int(job.id.removeprefix("job_")) % 2} and len(keys) == len(set(keys))


@given(STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_an_interrupted_transaction_leaves_no_partial_change(tmp_path_factory: pytest.TempPathFactory, steps: list):
    """SQLite is interrupted once, after a given number of its instructions."""
    store = JobStore(Database(tmp_path_factory.mktemp("store") / "plantain.sqlite"))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    for step, number, instructions in steps:
        breaks = iter([0] * instructions + [1])
        store.db.conn.set_progress_handler(lambda breaks=breaks: next(breaks, 0), 1)  # type: ignore[misc]
        with contextlib.suppress(sqlite3.OperationalError):
            act(store, user, step, number)
        store.db.conn.set_progress_handler(None, 1)
        assert not store.db.conn.in_transaction
        check_books(store, user)
    store.database.close()


@given(STEPS, STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)
def test_two_writers_at_once(tmp_path_factory: pytest.TempPathFactory, one: list, two: list):
    path = tmp_path_factory.mktemp("store") / "plantain.sqlite"
    store = JobStore(Database(path))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)

    def write(steps: list) -> None:
        own = JobStore(Database(path))
        for step, number, _ in steps:
            act(own, user, step, number)
        own.database.close()

    threads = [threading.Thread(target=write, args=[steps]) for steps in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_books(store, user)
    store.database.close()


def test_processes_that_are_killed_at_any_moment(tmp_path: Path):
    """Two processes at a time change the same jobs and print each step; they are killed after a random number of lines.

    How much comes of it depends on how they meet: there are at least four rounds, and as many as it takes.
    """
    path = tmp_path / "plantain.sqlite"
    store = JobStore(Database(path))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    ledger.grant(store.db, user, 90, "test", NOW)
    chance = random.Random(7)
    for round_ in range(40):
        if round_ >= 4 and len(store.jobs(user, None, 999)) > 10:
            break
        words = [sys.executable, "-m", "tests.jobs.test_transactions", str(path), user]
        pair = [
            subprocess.Popen([*words, str(10 * round_ + n)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
            for n in range(2)
        ]
        for process in pair:
            assert process.stdout
            for _ in range(chance.randrange(1, 60)):
                process.stdout.readline()
            process.kill()
            process.stdout.close()
            process.wait()
        check_books(store, user)
    assert len(store.jobs(user, None, 999)) > 10, "something happened"
    left = store.requeue_interrupted(NOW)
    for job in left:
        store.cancel(job.id, NOW)
    check_books(store, user)
    store.database.close()


def trouble(path: str, user: str, seed: str) -> None:
    """A process that takes random steps until it is killed."""
    chance = random.Random(seed)
    store = JobStore(Database(Path(path)))
    while True:
        act(store, user, chance.choice(ACTS[:-1]), chance.randrange(1, 60))
        print("done", flush=True)


if __name__ == "__main__":
    trouble(*sys.argv[1:])
