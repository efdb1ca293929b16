"""A real worker process: what it is told, what it tells, and how it ends."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.base import Component, Weights
from server.workers.devices import DeviceSpec
from server.workers.protocol import (
    Cancel,
    Cancelled,
    Died,
    Event,
    Evict,
    Failed,
    Progress,
    Ready,
    Resident,
    Run,
    Succeeded,
)
from server.workers.supervisor import Supervisor

CPU = DeviceSpec("cpu", "CPU", "cpu", 2**30, 2**30)
FAMILY = "tests.families.scripted"
PART = Component("network", "key-a", 10, Path("nowhere"))


class Child:
    """A supervised worker, and what it has said so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heard: asyncio.Queue[Event] = asyncio.Queue()
        self.supervisor = Supervisor(CPU, [FAMILY], lambda _, event: self.heard.put_nowait(event))

    async def next(self, *kinds: type) -> Any:
        """The next event of these kinds; others are passed over."""
        while True:
            event = await asyncio.wait_for(self.heard.get(), 60)
            if isinstance(event, kinds):
                return event

    def run(self, prompt: str, job_id: str = "j1") -> None:
        params = {"prompt": prompt, "width": 16, "height": 16, "seed": 9, "numInferenceSteps": 1}
        weights = Weights("wayward", FAMILY, self.folder, (PART,))
        output = self.folder / f"{job_id}.png"
        self.supervisor.send(Run(job_id, weights, "text-to-image", params, self.folder, output))


@pytest.fixture(scope="module")
def loop() -> Any:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def child(loop: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One worker for all tests here: it takes seconds to start. A test that kills it starts it again."""
    made = Child(tmp_path_factory.mktemp("worker"))

    async def start() -> None:
        made.supervisor.start()
        await made.next(Ready)

    loop.run(start())
    yield made
    loop.run(made.supervisor.stop(5))


@pytest.fixture
def tell(loop: asyncio.Runner, child: Child) -> Callable[[Callable[[Child], Awaitable[Any]]], Any]:
    return lambda story: loop.run(story(child))


def test_a_job_runs_to_a_file(tell: Any):
    async def story(child: Child) -> None:
        child.run("work")
        assert await child.next(Progress) == Progress("j1", "denoise", 0, 2)
        assert await child.next(Progress) == Progress("j1", "denoise", 2, 2)
        done = await child.next(Succeeded)
        assert (done.job_id, done.width, done.height) == ("j1", 16, 16)
        assert [key for key, _ in (await child.next(Resident)).components] == ["key-a"]
        with Image.open(child.folder / "j1.png") as image:
            assert image.getpixel((0, 0)) == (9, 0, 0)

    tell(story)


def test_a_component_is_evicted_on_command(tell: Any):
    async def story(child: Child) -> None:
        child.supervisor.send(Evict("key-a"))
        assert await child.next(Resident) == Resident(())

    tell(story)


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("raise a secret path", "GENERATION_FAILED", "The generation failed; the server's log says why."),
        ("refuse It has no ears.", "INVALID_MEDIA", "It has no ears."),
        ("run_out", "OUT_OF_MEMORY", "The device ran out of memory."),
    ],
)
def test_a_job_that_fails_leaves_the_worker_serving(tell: Any, prompt: str, code: str, message: str):
    async def story(child: Child) -> None:
        child.run(prompt)
        assert await child.next(Failed, Died) == Failed("j1", code, message)
        child.run("work", "j2")
        assert (await child.next(Succeeded)).job_id == "j2"

    tell(story)


def test_out_of_memory_frees_all_that_was_resident(tell: Any):
    async def story(child: Child) -> None:
        child.run("run_out")
        await child.next(Failed)
        assert await child.next(Resident) == Resident(())

    tell(story)


def test_a_cancel_stops_the_run_at_its_next_step_and_no_other(tell: Any):
    async def story(child: Child) -> None:
        child.run(f"wait {child.folder / 'never'}")
        await child.next(Progress)
        child.supervisor.send(Cancel("another"))
        child.supervisor.send(Cancel("j1"))
        assert await child.next(Cancelled, Succeeded) == Cancelled("j1")
        assert not (child.folder / "never.png").exists()

    tell(story)


@pytest.mark.parametrize("how", ["killed from outside", "die", "exit 3"])
def test_a_worker_that_ends_is_noticed_and_can_be_started_again(tell: Any, how: str):
    async def story(child: Child) -> None:
        if how == "killed from outside":
            child.run(f"wait {child.folder / 'never'}")
            await child.next(Progress)
            os.kill(child.supervisor.pid or 0, signal.SIGKILL)
        else:
            child.run(how)
        assert await child.next(Died) == Died(3 if how == "exit 3" else -signal.SIGKILL)
        child.supervisor.send(Cancel("j1"))  # to a dead worker: nothing happens
        child.supervisor.start()
        await child.next(Ready)
        child.run("work")
        assert await child.next(Succeeded)

    tell(story)


def test_a_worker_ends_with_its_server(tmp_path: Path):
    async def story() -> int:
        child = Child(tmp_path)
        child.supervisor.start()
        await child.next(Ready)
        await child.supervisor.stop(10)
        assert child.supervisor._process
        return child.supervisor._process.returncode

    assert asyncio.run(story()) == 0
