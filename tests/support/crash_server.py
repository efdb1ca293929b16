"""A server to be killed: the real store, dispatcher and supervisors; it asks itself for jobs as fast as it may."""

import asyncio
import logging
import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.base import Component, Weights
from server.accounts import ledger, users
from server.db.database import Database
from server.dispatch.dispatcher import Dispatcher
from server.files.store import FileStore
from server.jobs.job import NewJob
from server.jobs.store import JobStore
from server.model_registry import RunSpec
from server.scheduling.need import Need
from server.workers.devices import DeviceSpec
from server.workers.supervisor import Supervisor

MOST_WAITING = 12
RUNNABLE = RunSpec(
    Weights("light", "light", Path("x"), (Component("network", "a", 10, Path("x")),)), Need((("a", 10),), 5)
)


def run(folder: Path, finish: bool) -> None:
    """Until it is killed; or, to `finish`, until nothing waits or runs."""
    logging.disable(logging.CRITICAL)
    asyncio.run(serve(folder, finish))


async def serve(folder: Path, finish: bool) -> None:
    store, files = JobStore(Database(folder / "plantain.sqlite")), FileStore(folder / "files")
    user_id = the_user(store)
    files.sweep(store.file_names(), older_than_s=0)
    devices = [DeviceSpec(f"cpu{n}", "CPU", "cpu", 100, 25) for n in range(2)]
    shelf: Any = SimpleNamespace(families=list, runnable=lambda *_: RUNNABLE, peaks=None)
    spawn = partial(Supervisor, module="tests.support.stub_worker")
    dispatcher = Dispatcher(store, files, shelf, devices, spawn=spawn)
    await dispatcher.start()
    (folder / "up").touch()
    if finish:
        while dispatcher.status.queue or any(worker.job for worker in dispatcher.state.workers.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await dispatcher.stop()
        files.sweep(await store.database.call(store.file_names), older_than_s=0)
        store.database.close()
    else:
        await ask(dispatcher, user_id, folder / "accepted")


async def ask(dispatcher: Dispatcher, user_id: str, journal: Path) -> None:
    """Write down every job that was answered for, as a client would remember it."""
    with journal.open("a") as accepted:
        for number in numbers():
            while len(dispatcher.status.queue) >= MOST_WAITING:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            prompt = random.choice(["work", "work", "work", "fail"])
            output = dispatcher.effects.files.new_name(".png")
            new = NewJob(number, user_id, None, "image", "light", "text-to-image", {"prompt": prompt}, 1, output, 3)
            await dispatcher.submit(new, RUNNABLE)
            accepted.write(f"{number}\n")
            accepted.flush()
            os.fsync(accepted.fileno())
            if random.random() < 0.1:
                await dispatcher.cancel(number)


def the_user(store: JobStore) -> str:
    with store.database.atomic() as db:
        if not db.table("user").count:
            user_id = users.create_user(db, "Ada", "ada@example.com", time.time())
            ledger.grant(db, user_id, 1_000_000, "test", time.time())
    return users.user_by_email(store.db, "ada@example.com")


def numbers() -> Iterator[str]:
    prefix = f"{os.getpid()}-{time.monotonic_ns()}"
    number = 0
    while True:
        number += 1
        yield f"job_{prefix}_{number}"
