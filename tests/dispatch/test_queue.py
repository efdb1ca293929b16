"""The queue as people meet it: why they wait and how long, what an admin switches, and jobs that hang."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from server.accounts import ledger, users
from server.dispatch.messages import Tick
from server.dispatch.queue import WHOLE_QUEUE
from server.errors import ConcurrencyLimit, QueueFull, Unavailable
from server.jobs import store
from server.workers.protocol import Progress, Ready, Succeeded
from tests.dispatch.test_dispatcher import NOW, Bench, bench, told


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


async def tick(it: Bench) -> None:
    it.dispatcher.inbox.put_nowait(Tick())
    await it.settle()


def seconds_until_start(it: Bench, job_id: str) -> float | None:
    place = it.dispatcher.status.place(job_id)
    assert place
    return None if place.start_at is None else round(place.start_at - it.dispatcher.effects.clock(), 3)


@told()
async def test_every_job_has_its_place_its_reason_and_its_expected_start(it: Bench):
    it.worker().says(Ready())
    for number in (1, 2, 3):
        await it.submit(number)
    await it.settle()
    assert it.dispatcher.status.place("j1") is None, "it runs"
    assert it.dispatcher.status.seconds_left("j1") == pytest.approx(10.0, abs=0.1), "nobody knows yet; images take 10 s"
    assert (it.dispatcher.status.position("j2"), seconds_until_start(it, "j2")) == (1, pytest.approx(10.0, abs=0.1))
    assert (it.dispatcher.status.position("j3"), seconds_until_start(it, "j3")) == (2, pytest.approx(20.0, abs=0.1))
    assert it.dispatcher.status.reason("j3") == "needs 0.0 GiB; the CPU has 0.0 GiB in about 20 s"


@told()
async def test_how_long_jobs_take_is_learned_and_outlives_the_server(it: Bench):
    it.worker().says(Ready())
    for number in (1, 2):
        await it.submit(number)
    await it.settle()
    it.worker().says(Succeeded("j1", 8, 8, 2.0))
    await it.submit(3)
    await it.settle()
    assert seconds_until_start(it, "j3") == pytest.approx(2.0, abs=0.1), "those that wait are told"
    it.worker().says(Succeeded("j2", 8, 8, 4.0))
    await it.settle()
    assert it.dispatcher.status.seconds_left("j3") == pytest.approx(2.6, abs=0.1)
    (timing,) = it.store.db.query("SELECT * FROM timing")
    assert (timing["model"], timing["runs"], round(timing["run_s"], 2)) == ("a", 2, 2.6)


def test_how_far_a_promise_was_off_is_measured(tmp_path: Path):
    async def tell() -> None:
        clock = Clock()
        async with bench(tmp_path, clock=clock) as it:
            it.worker().says(Ready())
            await it.settle()
            await it.submit(1)
            await it.settle()
            await it.submit(2)
            await it.settle()
            clock.now += 13.0
            it.worker().says(Succeeded("j1", 8, 8, 13.0))
            await it.settle()
            assert it.job(2).started_at == NOW + 13
            kept = store.start_prediction_error(it.store.db)
            assert (kept["jobs"], kept["p95OffSeconds"]) == (2, 0.0)
            assert kept["medianOffSeconds"] == pytest.approx(1.5, abs=0.1), "one at once, one three seconds late"

    asyncio.run(tell())


def test_a_job_that_hangs_is_killed_runs_once_more_and_is_then_refunded(tmp_path: Path):
    async def tell() -> None:
        clock = Clock()
        async with bench(tmp_path, clock=clock) as it:
            it.worker().says(Ready())
            await it.submit(1)
            await it.settle()
            clock.now += 390
            it.worker().says(Progress("j1", "denoise", 1, 4))
            await it.settle()
            clock.now += 390
            await tick(it)
            assert (it.worker().starts, it.job(1).status) == (1, "running"), "progress is its heartbeat"
            clock.now += 20
            await tick(it)
            assert (it.worker().starts, it.job(1).status) == (2, "queued")
            it.worker().says(Ready())
            await it.settle()
            clock.now += 500
            await tick(it)
            assert it.job(1).error and it.job(1).error["code"] == "GENERATION_TIMEOUT"
            assert ledger.balance(it.store.db, it.user) == 100

    asyncio.run(tell())


def test_a_clock_set_back_kills_nothing_and_forgets_nothing(tmp_path: Path):
    async def tell() -> None:
        clock = Clock()
        async with bench(tmp_path, clock=clock) as it:
            it.worker().says(Ready())
            await it.submit(1)
            await it.submit(2)
            await it.settle()
            clock.now -= 86_400
            await tick(it)
            it.worker().says(Succeeded("j1", 8, 8, 1.0))
            await it.settle()
            assert [it.job(1).status, it.job(2).status] == ["succeeded", "running"]
            clock.now += 300
            await tick(it)
            assert it.worker().starts == 1

    asyncio.run(tell())


@told()
async def test_a_database_locked_by_another_process_holds_the_queue_up_and_loses_nothing(it: Bench):
    it.worker().says(Ready())
    await it.submit(1)
    await it.settle()
    it.store.db.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(it.dispatcher.effects.files.root.parent / "plantain.sqlite")
    other.execute("BEGIN IMMEDIATE")
    it.worker().says(Succeeded("j1", 8, 8, 1.0))
    while not it.dispatcher.unhealthy_reason:
        await it.settle()
    assert it.dispatcher.unhealthy_reason == "the database cannot be written: database is locked"
    assert not it.dispatcher.ready
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        await it.submit(2)
    other.close()
    assert (await asyncio.wait_for(it.dispatcher.wait("j1"), 5)).status == "succeeded"
    await it.settle()
    assert (it.dispatcher.unhealthy_reason, ledger.balance(it.store.db, it.user)) == (None, 99)


@told()
async def test_a_paused_queue_takes_jobs_and_starts_none(it: Bench):
    await it.dispatcher.pause_queue()
    it.worker().says(Ready())
    await it.submit(1)
    await it.settle()
    assert it.told() == []
    assert it.dispatcher.status.reason("j1") == "the queue is paused"
    assert it.store.paused() == {WHOLE_QUEUE}, "restarts or not"
    await it.dispatcher.resume_queue()
    await it.settle()
    assert it.told() == ["j1"]


@told(devices=2)
async def test_a_drained_device_ends_what_it_runs_and_starts_nothing(it: Bench):
    it.worker("gpu0").says(Ready())
    await it.submit(1)
    await it.settle()
    await it.dispatcher.drain_device("gpu0")
    await it.submit(2)
    it.worker("gpu0").says(Succeeded("j1", 8, 8, 1.0))
    await it.settle()
    assert (it.told("gpu0"), it.job(1).status) == (["j1"], "succeeded")
    it.worker("gpu1").says(Ready())
    await it.settle()
    assert it.told("gpu1") == ["j2"]


@told()
async def test_an_admin_moves_a_job_to_the_front(it: Bench):
    for number in (1, 2, 3):
        await it.submit(number)
    await it.settle()
    assert (await it.dispatcher.set_priority("j3", 1)).priority == 1
    assert [it.dispatcher.status.position(f"j{number}") for number in (1, 2, 3)] == [2, 3, 1]
    it.worker().says(Ready())
    await it.settle()
    assert it.told() == ["j3"]


def test_a_batch_of_one_user_holds_up_nobody(tmp_path: Path):
    async def tell() -> None:
        clock = Clock()
        async with bench(tmp_path, clock=clock) as it:
            bob = users.create_user(it.store.db, "Bob", "bob@example.com", NOW)
            for number in range(1, 6):
                await it.submit(number)
            await it.submit(6, user=bob)
            it.worker().says(Ready())
            await it.settle()
            clock.now += 1
            it.worker().says(Succeeded("j1", 8, 8, 1.0))
            await it.settle()
            assert it.told() == ["j1", "j6"]

    asyncio.run(tell())


@told(max_queued_each=2)
async def test_one_user_s_queue_is_bounded_and_others_are_let_in(it: Bench):
    bob = users.create_user(it.store.db, "Bob", "bob@example.com", NOW)
    await it.submit(1)
    await it.submit(2)
    await it.settle()
    with pytest.raises(ConcurrencyLimit, match="You have 2 jobs waiting"):
        await it.submit(3)
    assert (await it.submit(4, user=bob)) == "j4"


@told(max_queued=20)
async def test_a_full_queue_says_when_to_come_again(it: Bench):
    for number in range(20):
        await it.submit(number)
    await it.settle()
    with pytest.raises(QueueFull) as caught:
        await it.submit(20)
    assert caught.value.headers["Retry-After"] == "20", "a tenth of 20 jobs of 10 s on one device"


@told()
async def test_a_leaving_server_ends_what_runs_and_keeps_what_waits(it: Bench):
    it.worker().says(Ready())
    await it.submit(1)
    await it.submit(2)
    await it.settle()
    waiting = asyncio.create_task(it.dispatcher.wait("j2"))
    await it.settle()
    leaving = asyncio.create_task(it.dispatcher.drain(60.0))
    await it.settle()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await it.submit(3)
    assert not leaving.done()
    it.worker().says(Succeeded("j1", 8, 8, 1.0))
    await asyncio.wait_for(leaving, 5)
    assert [it.job(1).status, it.job(2).status] == ["succeeded", "queued"]
    assert it.told() == ["j1"]


@told()
async def test_the_patience_of_a_leaving_server_ends(it: Bench):
    it.worker().says(Ready())
    await it.submit(1)
    await it.settle()
    await it.dispatcher.drain(0.05)
    await it.dispatcher.stop()
    assert (it.job(1).status, it.job(1).attempts) == ("queued", 0)
