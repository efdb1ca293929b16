"""Jobs, credits and files in a real SQLite file."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.accounts import admin, keys, ledger, users
from server.db.database import Database
from server.errors import InsufficientCredits, InvalidApiKey, KeyDisabled, KeyExpired
from server.jobs.job import NewJob
from server.jobs.store import JobStore

NOW = 1_790_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(Database(tmp_path / "plantain.sqlite"))
    yield opened
    opened.database.close()


@pytest.fixture
def user(store: JobStore) -> str:
    return users.create_user(store.db, "Ada", "ada@example.com", NOW)


def new_job(user: str, number: int = 1, credits: int = 3) -> NewJob:
    return NewJob(
        id=f"job_{number}",
        user_id=user,
        key_id=None,
        kind="image",
        model="flux-schnell",
        workflow="text-to-image",
        params={"prompt": "a cat", "seed": 7},
        pixels=64,
        output_name=f"{number}.png",
        credits=credits,
        input_names=(f"in-{number}.png",),
    )


def kinds(store: JobStore, user: str) -> list[tuple[str, int, int]]:
    return [(row["kind"], row["amount"], row["balance"]) for row in ledger.entries(store.db, user, None, 99)][::-1]


def test_a_job_is_charged_and_queued_at_once(store: JobStore, user: str):
    job, balance = store.insert(new_job(user), NOW)
    assert (job.status, job.credits, balance) == ("queued", 3, 7)
    assert kinds(store, user) == [("grant", 10, 10), ("charge", -3, 7)]


def test_a_job_that_costs_too_much_leaves_nothing_behind(store: JobStore, user: str):
    with pytest.raises(InsufficientCredits) as caught:
        store.insert(new_job(user, credits=11), NOW)
    assert caught.value.extra == {"required": 11, "balance": 10}
    assert store.jobs(user, None, 9) == []
    assert kinds(store, user) == [("grant", 10, 10)]
    assert store.file_names() == set()


def test_a_job_goes_from_queued_to_succeeded(store: JobStore, user: str):
    store.insert(new_job(user), NOW)
    running = store.start("job_1", "cpu", NOW + 1)
    done = store.succeed("job_1", {"width": 8, "height": 8}, NOW + 2)
    assert running and (running.status, running.device, running.attempts) == ("running", "cpu", 1)
    assert done and (done.status, done.output, done.finished_at) == ("succeeded", {"width": 8, "height": 8}, NOW + 2)
    assert store.file_names() == {"in-1.png", "1.png"}


def test_a_job_ends_once_and_is_refunded_once(store: JobStore, user: str):
    store.insert(new_job(user), NOW)
    assert store.cancel("job_1", NOW)
    assert store.cancel("job_1", NOW) is None
    assert store.fail("job_1", {"error": "x", "code": "X"}, NOW) is None
    assert store.start("job_1", "cpu", NOW) is None
    assert store.succeed("job_1", {}, NOW) is None
    assert kinds(store, user) == [("grant", 10, 10), ("charge", -3, 7), ("refund", 3, 10)]


def test_a_job_whose_worker_crashes_runs_again_once_then_fails_with_a_refund(store: JobStore, user: str):
    store.insert(new_job(user), NOW)
    store.start("job_1", "cpu", NOW)
    again = store.requeue("job_1", NOW)
    assert again and again.status == "queued"
    store.start("job_1", "cpu", NOW)
    failed = store.requeue("job_1", NOW)
    assert failed and failed.status == "failed"
    assert ledger.balance(store.db, user) == 10


def test_a_restarted_server_recovers_unfinished_jobs(tmp_path: Path):
    path = tmp_path / "plantain.sqlite"
    first = JobStore(Database(path))
    user = users.create_user(first.db, "Ada", "ada@example.com", NOW)
    for number in (1, 2, 3):
        first.insert(new_job(user, number), NOW)
    first.start("job_1", "cpu", NOW)
    first.database.close()
    second = JobStore(Database(path))
    assert [(job.id, job.status, job.attempts) for job in second.requeue_interrupted(NOW)] == [
        ("job_1", "queued", 1),
        ("job_2", "queued", 0),
        ("job_3", "queued", 0),
    ]
    second.database.close()


def test_lists_are_paginated_newest_first(store: JobStore, user: str):
    for number in (1, 2, 3):
        store.insert(new_job(user, number, credits=1), NOW)
    first = store.jobs(user, None, 2)
    assert [job.id for job in first] == ["job_3", "job_2"]
    assert [job.id for job in store.jobs(user, first[-1].id, 2)] == ["job_1"]
    assert store.jobs("somebody-else", None, 9) == []


def test_keys_are_stored_hashed_and_stop_when_revoked_or_expired(store: JobStore, user: str):
    _, key = keys.create_key(store.db, user, "laptop", NOW, expires_at=NOW + 60)
    assert key.startswith("bnp_") and len(key) == 68
    assert key not in str(list(store.db.query("SELECT * FROM apikey")))
    assert keys.authenticate(store.db, key, NOW).user_id == user
    with pytest.raises(KeyExpired):
        keys.authenticate(store.db, key, NOW + 60)
    with pytest.raises(InvalidApiKey):
        keys.authenticate(store.db, key + "x", NOW)
    keys.revoke_key(store.db, keys.list_keys(store.db)[0]["id"], NOW)
    with pytest.raises(KeyDisabled):
        keys.authenticate(store.db, key, NOW)


def test_the_owner_is_created_on_the_first_start_only(store: JobStore):
    key = admin.create_owner(store.db, NOW)
    assert key and keys.authenticate(store.db, key, NOW).role == "admin"
    assert admin.create_owner(store.db, NOW) is None


def test_concurrent_charges_never_exceed_the_balance(tmp_path: Path):
    path = tmp_path / "plantain.sqlite"
    store = JobStore(Database(path))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    outcomes: list[str] = []

    def spend(first: int) -> None:
        own = JobStore(Database(path))
        for number in range(first, first + 10):
            try:
                own.insert(new_job(user, number, credits=1), NOW)
                outcomes.append("paid")
            except InsufficientCredits:
                outcomes.append("refused")
        own.database.close()

    threads = [threading.Thread(target=spend, args=[100 * n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["paid"] * 10 + ["refused"] * 30
    assert ledger.balance(store.db, user) == 0
    store.database.close()


ACTS = ["insert", "start", "succeed", "fail", "cancel", "requeue", "recover"]
STEPS = st.lists(st.tuples(st.sampled_from(ACTS), st.integers(1, 4)))


@given(STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_in_any_order_of_events_the_ledger_adds_up(tmp_path_factory: pytest.TempPathFactory, steps: list):
    store = JobStore(Database(tmp_path_factory.mktemp("store") / "plantain.sqlite"))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    for step, number in steps:
        job_id = f"job_{number}"
        try:
            match step:
                case "insert":
                    store.insert(new_job(user, number), NOW)
                case "start":
                    store.start(job_id, "cpu", NOW)
                case "succeed":
                    store.succeed(job_id, {}, NOW)
                case "recover":
                    store.requeue_interrupted(NOW)
                case "fail":
                    store.fail(job_id, {}, NOW)
                case "cancel" | "requeue":
                    getattr(store, step)(job_id, NOW)
        except (InsufficientCredits, sqlite3.IntegrityError):
            continue
    entries = ledger.entries(store.db, user, None, 999)
    owed = sum(job.credits for job in store.jobs(user, None, 99) if job.status not in ("failed", "cancelled"))
    assert ledger.balance(store.db, user) == 10 - owed == sum(entry["amount"] for entry in entries)
    assert all(entry["balance"] >= 0 for entry in entries)
    store.database.close()
