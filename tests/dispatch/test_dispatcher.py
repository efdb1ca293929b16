"""The dispatcher with a recording supervisor: events in, commands and rows out."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.base import Component, Weights
from server.accounts import ledger, users
from server.db.database import Database
from server.dispatch import actions
from server.dispatch.dispatcher import Dispatcher
from server.dispatch.queue import JobQueue
from server.dispatch.recovery import completed_run
from server.dispatch.worker_state import START_TIMEOUT_S
from server.errors import DoesNotFit, InsufficientCredits, QueueFull, Unavailable
from server.files.store import FileStore
from server.jobs.job import Job, NewJob
from server.jobs.store import JobStore
from server.model_registry import RunSpec
from server.scheduling.estimates import PeakEstimates
from server.scheduling.need import Need
from server.workers import protocol
from server.workers.devices import DeviceSpec
from server.workers.protocol import (
    Cancel,
    Cancelled,
    Died,
    Evict,
    Failed,
    Progress,
    Ready,
    Resident,
    Run,
    Shutdown,
    Succeeded,
)

NOW = 1_790_000_000.0


class Recorder:
    """A supervisor that writes down what it is told."""

    def __init__(self, device: DeviceSpec, families: Any, on_event: Callable[[str, Any], None]) -> None:
        self.device, self.on_event = device, on_event
        self.told: list[Any] = []
        self.starts = 0

    def start(self) -> None:
        self.starts += 1

    def send(self, command: Any) -> None:
        self.told.append(command)

    def kill(self) -> None:
        self.says(Died(-9))

    async def stop(self, patience_s: float) -> None:
        self.told.append(Shutdown())

    def says(self, *events: Any) -> None:
        for event in events:
            self.on_event(self.device.id, event)


class Bench:
    """A dispatcher over real SQLite and recorded workers."""

    def __init__(self, dispatcher: Dispatcher, store: JobStore) -> None:
        self.dispatcher, self.store = dispatcher, store
        self.user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
        ledger.grant(store.db, self.user, 90, "test", NOW)

    def worker(self, device: str = "gpu0") -> Recorder:
        return self.dispatcher.state.workers[device].supervisor  # type: ignore[return-value]

    async def submit(
        self,
        number: int,
        model: str = "a",
        weights: int = 10,
        working: int = 5,
        price: int = 1,
        user: str | None = None,
    ) -> str:
        output = self.dispatcher.effects.files.new_name(".png")
        new = NewJob(
            f"j{number}", user or self.user, None, "image", model, "text-to-image", {"seed": 1}, 1, output, price
        )
        job, _ = await self.dispatcher.submit(new, runnable(model, weights, working))
        return job.id

    def told(self, device: str = "gpu0") -> list[Any]:
        return [command.job_id if isinstance(command, Run) else command for command in self.worker(device).told]

    def job(self, number: int) -> Job:
        return self.store.job(f"j{number}")

    async def settle(self) -> None:
        """Until the dispatcher has handled all it was told."""
        for _ in range(50):
            await asyncio.sleep(0.002)
            if self.dispatcher.inbox.empty():
                await self.store.database.call(lambda: None)


def runnable(model: str, weights: int = 10, working: int = 5) -> RunSpec:
    parts = Weights(model, "wayward", Path("x"), (Component("network", model, weights, Path("x")),))
    return RunSpec(parts, Need(((model, weights),), working))


@asynccontextmanager
async def bench(tmp_path: Path, devices: int = 1, **options: Any) -> AsyncIterator[Bench]:
    store = JobStore(Database(tmp_path / "plantain.sqlite"))
    shelf: Any = SimpleNamespace(
        families=list, runnable=lambda model, *_: runnable(model), peaks=PeakEstimates("cpu", [])
    )
    budget_bytes = options.pop("budget_bytes", 25)
    specs = [DeviceSpec(f"gpu{n}", "GPU", "cpu", 4 * budget_bytes, budget_bytes) for n in range(devices)]
    spawn: Any = Recorder
    clock = options.pop("clock", lambda: NOW)
    dispatcher = Dispatcher(store, FileStore(tmp_path / "files"), shelf, specs, spawn=spawn, clock=clock, **options)
    made = Bench(dispatcher, store)
    await dispatcher.start()
    yield made
    await dispatcher.stop()
    store.database.close()


def story(test: Callable[[Bench], Awaitable[None]], **options: Any) -> Callable[[Path], None]:
    """A test told as a coroutine over a bench."""

    def run(tmp_path: Path) -> None:
        async def tell() -> None:
            async with bench(tmp_path, **options) as made:
                await test(made)

        asyncio.run(tell())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def told(**options: Any) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[Path], None]]:
    return lambda test: story(test, **options)


@told()
async def test_a_job_waits_for_a_worker_and_runs_to_its_end(it: Bench):
    job_id = await it.submit(1)
    await it.settle()
    assert it.told() == []
    waiting = asyncio.create_task(it.dispatcher.wait(job_id))
    it.worker().says(Ready())
    await it.settle()
    assert it.told() == ["j1"]
    it.worker().says(Progress("j1", "denoise", 1, 4))
    await it.settle()
    assert it.dispatcher.status.progress["j1"].step == 1
    it.worker().says(Succeeded("j1", 8, 8, 0.5), Resident((("a", 10),)))
    job = await waiting
    assert (job.status, job.device, job.output) == ("succeeded", "gpu0", {"width": 8, "height": 8})
    assert it.dispatcher.status.progress == {}


@told()
async def test_one_job_at_a_time_on_a_device_the_oldest_first(it: Bench):
    for number in (1, 2, 3):
        await it.submit(number)
    it.worker().says(Ready())
    await it.settle()
    assert it.told() == ["j1"]
    assert it.dispatcher.status.position("j3") == 2
    assert it.dispatcher.status.reason("j3") == "needs 0.0 GiB; the CPU has 0.0 GiB in about 20 s"
    it.worker().says(Succeeded("j1", 8, 8, 0.5))
    await it.settle()
    assert it.told() == ["j1", "j2"]


@told(devices=2)
async def test_a_job_goes_to_the_worker_that_has_its_weights(it: Bench):
    it.worker("gpu0").says(Ready(), Resident((("a", 10),)))
    it.worker("gpu1").says(Ready(), Resident((("b", 10),)))
    await it.submit(1, "b")
    await it.submit(2, "a")
    await it.settle()
    assert (it.told("gpu0"), it.told("gpu1")) == (["j2"], ["j1"])


@told()
async def test_what_is_in_the_way_is_evicted_before_the_job_starts(it: Bench):
    it.worker().says(Ready(), Resident((("a", 10), ("b", 10))))
    await it.submit(1, "c")
    await it.settle()
    assert it.told() == [Evict("a"), "j1"]
    assert it.dispatcher.state.workers["gpu0"].resident == (("b", 10), ("c", 10))


@told()
async def test_a_worker_that_dies_is_started_again_and_its_job_runs_once_more(it: Bench):
    it.worker().says(Ready())
    await it.submit(1)
    await it.submit(2)
    await it.settle()
    it.worker().says(Died(-9))
    await it.settle()
    assert it.worker().starts == 2
    assert it.job(1).status == "queued" and it.dispatcher.status.position("j1") == 1
    it.worker().says(Ready())
    await it.settle()
    assert it.told() == ["j1", "j1"]
    it.worker().says(Died(-9))
    await it.settle()
    assert it.job(1).status == "failed"
    assert ledger.balance(it.store.db, it.user) == 99


@told()
async def test_a_worker_that_dies_again_and_again_is_started_later_and_later(it: Bench):
    it.worker().says(Died(1))
    await it.settle()
    it.worker().says(Died(1))
    await it.settle()
    assert it.worker().starts == 2, "the second respawn waits a second"
    assert not it.dispatcher.ready


def test_a_worker_that_hangs_while_it_starts_is_killed_and_started_again(tmp_path: Path):
    now = [NOW]

    @told(clock=lambda: now[0])
    async def story(it: Bench) -> None:
        now[0] += START_TIMEOUT_S
        actions.kill_stalled_workers(it.dispatcher.state, it.dispatcher.effects)
        await it.settle()
        assert it.worker().starts == 1, "not yet"
        now[0] += 1
        actions.kill_stalled_workers(it.dispatcher.state, it.dispatcher.effects)
        await it.settle()
        assert it.worker().starts == 2
        it.worker().says(Ready())
        await it.settle()
        now[0] += 2 * START_TIMEOUT_S
        actions.kill_stalled_workers(it.dispatcher.state, it.dispatcher.effects)
        await it.settle()
        assert it.worker().starts == 2 and it.dispatcher.ready

    story(tmp_path)


def test_who_has_had_how_much_is_known_after_a_restart(tmp_path: Path):
    now, books = [NOW], []

    @told(clock=lambda: now[0])
    async def before(it: Bench) -> None:
        it.worker().says(Ready())
        await it.submit(1)
        await it.settle()
        now[0] += 30.0
        it.worker().says(Succeeded("j1", 8, 8, 30.0))
        await it.settle()
        books.append((it.user, it.dispatcher.state.queue.turns.shares))

    before(tmp_path)
    store = JobStore(Database(tmp_path / "plantain.sqlite"))
    again = JobQueue([], [], [completed_run(run) for run in store.completed_runs(now[0] - 3600)]).turns.shares
    store.database.close()
    user, shares = books[0]
    assert again.spent(user) == pytest.approx(shares.spent(user)) == pytest.approx(30.0)
    assert again.last_start_at[user] == shares.last_start_at[user]


@told()
async def test_a_full_queue_at_fal_says_when_a_tenth_of_it_should_have_ended(it: Bench):
    await it.submit(1)
    job, backlog = it.job(1), it.dispatcher.state.queue
    ran = replace(job, kind="video", started_at=NOW, finished_at=NOW + 60.0)
    assert backlog.remote_retry_after_s([ran], NOW + 100.0) == 80, "a guess by kind: 180 s"
    backlog.record_remote_duration(ran)
    assert backlog.remote_retry_after_s([ran, *[replace(ran, started_at=NOW + 40.0)] * 9], NOW + 40.0) == 60
    assert backlog.remote_retry_after_s([ran], NOW + 90.0) == 5, "overdue"


@told()
async def test_a_job_that_fails_is_refunded_and_the_next_one_runs(it: Bench):
    it.worker().says(Ready())
    job_id = await it.submit(1)
    await it.submit(2)
    waiting = asyncio.create_task(it.dispatcher.wait(job_id))
    await it.settle()
    it.worker().says(Failed("j1", "GENERATION_FAILED", "It broke."))
    assert (await waiting).error == {"error": "It broke.", "code": "GENERATION_FAILED"}
    await it.settle()
    assert it.told() == ["j1", "j2"]
    assert ledger.balance(it.store.db, it.user) == 99


@told()
async def test_a_job_out_of_memory_runs_once_more_on_the_emptied_device(it: Bench):
    it.worker().says(Ready(), Resident((("b", 10),)))
    await it.submit(1)
    await it.settle()
    it.worker().says(Failed("j1", "OUT_OF_MEMORY", "Out of memory."), Resident(()))
    await it.settle()
    assert it.told() == ["j1", "j1"]
    it.worker().says(Failed("j1", "OUT_OF_MEMORY", "Out of memory."), Resident(()))
    await it.settle()
    assert it.job(1).status == "failed"


@told()
async def test_a_queued_job_is_cancelled_at_once(it: Bench):
    await it.submit(1)
    job = await it.dispatcher.cancel("j1")
    assert job.status == "cancelled"
    it.worker().says(Ready())
    await it.settle()
    assert it.told() == []
    assert ledger.balance(it.store.db, it.user) == 100


@told()
async def test_a_running_job_is_cancelled_at_its_next_step(it: Bench):
    it.worker().says(Ready())
    await it.submit(1)
    await it.settle()
    assert (await it.dispatcher.cancel("j1")).status == "running"
    assert it.told() == ["j1", Cancel("j1")]
    it.worker().says(Cancelled("j1"))
    await it.settle()
    assert it.job(1).status == "cancelled"


@told()
async def test_a_cancel_that_comes_too_late_changes_nothing(it: Bench):
    it.worker().says(Ready())
    await it.submit(1)
    await it.settle()
    it.worker().says(Succeeded("j1", 8, 8, 0.1))
    await it.settle()
    assert (await it.dispatcher.cancel("j1")).status == "succeeded"


@told(max_queued=2)
async def test_what_cannot_be_taken_is_refused_before_it_is_charged(it: Bench):
    with pytest.raises(DoesNotFit, match=r"needs 0\.0 GiB; the largest device here has"):
        await it.submit(1, weights=1000)
    with pytest.raises(InsufficientCredits):
        await it.submit(1, price=101)
    await it.submit(2)
    await it.submit(3)
    await it.settle()
    with pytest.raises(QueueFull):
        await it.submit(4)
    assert [job.id for job in it.store.jobs(it.user, None, 9)] == ["j3", "j2"]


@told()
async def test_a_stopping_server_tells_those_who_wait_and_keeps_their_jobs(it: Bench):
    it.worker().says(Ready())
    waiting = asyncio.create_task(it.dispatcher.wait(await it.submit(1)))
    await it.settle()
    await it.dispatcher.stop()
    with pytest.raises(Unavailable):
        await waiting
    assert (it.job(1).status, it.job(1).attempts) == ("queued", 0)


@told()
async def test_ready_is_the_truth(it: Bench):
    assert not it.dispatcher.ready
    it.worker().says(Ready())
    await it.settle()
    assert it.dispatcher.ready
    it.worker().says(Died(1))
    await it.settle()
    assert not it.dispatcher.ready


def test_the_queue_outlives_the_server(tmp_path: Path):
    async def first() -> None:
        async with bench(tmp_path) as it:
            it.worker().says(Ready())
            await it.submit(1)
            await it.submit(2)
            await it.settle()

    async def second() -> list[str]:
        store = JobStore(Database(tmp_path / "plantain.sqlite"))
        shelf: Any = SimpleNamespace(
            families=list, runnable=lambda model, *_: runnable(model), peaks=PeakEstimates("cpu", [])
        )
        spec = DeviceSpec("gpu0", "GPU", "cpu", 100, 25)
        spawn: Any = Recorder
        dispatcher = Dispatcher(store, FileStore(tmp_path / "files"), shelf, [spec], spawn=spawn)
        await dispatcher.start()
        found = list(dispatcher.status.queue)
        await dispatcher.stop()
        store.database.close()
        return found

    asyncio.run(first())
    assert asyncio.run(second()) == ["j1", "j2"]


def test_every_command_and_event_crosses_a_pipe(tmp_path: Path):
    import pickle

    run = Run("j", runnable("a").weights, "text-to-image", {"seed": 1}, tmp_path, tmp_path / "x.png")
    for message in (run, Evict("a"), Cancel("j"), protocol.Ready(), Progress("j", "denoise", 1, 2), Resident(())):
        assert pickle.loads(pickle.dumps(message)) == message
