"""Prefetching in a whole server: the next job's weights are there before its run, and bad luck is nobody else's."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.scheduling.plan import Policy
from server.settings import Settings
from server.workers.protocol import Evict, Prefetched, Resident, Run
from tests.support.server import GENERATE, LiveServer, install_test_models, running

ASYNC = {"Prefer": "respond-async"}
FILE = "transformer/diffusion_pytorch_model.safetensors"


class Watched:
    """A server whose tiny weights are worth being prefetched, and what its worker was told and told, in order."""

    def __init__(self, live_server: LiveServer, folder: Path) -> None:
        self.live_server, self.folder = live_server, folder
        self.log: list[Any] = []
        dispatcher = live_server.services.dispatcher
        dispatcher.state.queue.policy = Policy(min_prefetch_bytes=1)
        self.worker = dispatcher.state.workers["cpu"]
        supervisor = self.worker.supervisor
        send, on_event = supervisor.send, supervisor._on_event
        supervisor.send = lambda command: (self.log.append(command), send(command))[1]  # type: ignore[method-assign]
        supervisor._on_event = lambda device, event: (self.log.append(event), on_event(device, event))[1]

    def hold(self, name: str) -> str:
        """A job that runs, from now on and until it is let go."""
        job_id = self.ask("wayward", f"wait {self.folder / name}")
        self.runs(job_id)
        return job_id

    def let_go(self, name: str) -> None:
        (self.folder / name).touch()

    def ask(self, model: str, prompt: str = "a red circle") -> str:
        return self.live_server.ask(GENERATE, {"prompt": prompt, "model": model, "seed": 1}, **ASYNC).json()["id"]

    def status(self, job_id: str) -> str:
        return self.live_server.read(f"/api/jobs/{job_id}")["status"]

    def ends(self, job_id: str) -> str:
        return self.live_server.until(lambda: (now := self.status(job_id)) not in ("queued", "running") and now)

    def runs(self, job_id: str) -> None:
        self.live_server.until(lambda: self.worker.job and self.worker.job.job_id == job_id)

    def prefetched(self, job_id: str) -> Prefetched:
        """What the worker says at the errand's end."""
        said = lambda: [each for each in self.log if isinstance(each, Prefetched) and each.job_id == job_id]  # noqa: E731
        return self.live_server.until(said)[0]

    def keys_before(self, job_id: str) -> set[str]:
        """What the worker last told to be resident before the job was sent to it."""
        index = next(n for n, each in enumerate(self.log) if isinstance(each, Run) and each.job_id == job_id)
        told = [each for each in self.log[:index] if isinstance(each, Resident)]
        return {key for key, _ in told[-1].components}

    def device(self) -> dict[str, Any]:
        return self.live_server.read("/api/admin/devices")["devices"][0]

    def books_are_right(self) -> None:
        """What the server thinks is resident is what the worker told last, and as many bytes."""
        self.live_server.until(
            lambda: self.worker.status == "idle" and not [p for p in self.worker.prefetches if p.pending]
        )
        told = [each for each in self.log if isinstance(each, Resident)][-1]
        self.live_server.until(lambda: dict(self.worker.resident) == dict(told.components))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return install_test_models(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def live_server(settings: Settings) -> Iterator[LiveServer]:
    with running(settings) as it:
        yield it


@pytest.fixture
def it(live_server: LiveServer, tmp_path: Path) -> Iterator[Watched]:
    """With nothing resident."""
    worker = live_server.services.dispatcher.state.workers["cpu"]
    supervisor, policy = worker.supervisor, live_server.services.dispatcher.state.queue.policy
    live_server.until(lambda: worker.status == "idle")
    for key in dict(worker.resident):
        worker.remove({key})
        supervisor.send(Evict(key))
    calls = supervisor.send, supervisor._on_event
    yield Watched(live_server, tmp_path)
    supervisor.send, supervisor._on_event = calls  # type: ignore[method-assign]
    live_server.services.dispatcher.state.queue.policy = policy


def keys_of(it: Watched, model: str) -> set[str]:
    found = it.live_server.services.registry.installed.weights(it.live_server.services.registry.find(model))
    assert found
    return {component.key for component in found.components}


def test_the_second_jobs_components_are_resident_before_its_run_begins(it: Watched, settings: Settings):
    first, second = it.hold("flag"), it.ask("flux-schnell")
    assert it.prefetched(second).failure == ""
    assert it.status(first) == "running"
    state = it.device()["prefetch"]
    assert (state["jobId"], state["ended"], state["failure"]) == (second, True, None)
    assert {each["name"] for each in state["components"]} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert "loads its weights meanwhile" in it.live_server.read(f"/api/jobs/{second}")["queue"]["reason"]
    where = ["--data", str(settings.data), "--weights-toml", str(settings.weights_toml)]
    told = CliRunner().invoke(app, ["devices", *where], env={"COLUMNS": "200"})
    assert f"prefetched for {second}: text_encoder (" in told.output
    it.let_go("flag")
    assert it.ends(second) == "succeeded"
    assert it.keys_before(second) >= keys_of(it, "flux-schnell")
    it.books_are_right()


def test_a_file_that_is_gone_is_no_concern_of_the_running_job_and_the_next_one_meets_it(
    it: Watched, settings: Settings
):
    file = settings.data.parent / "made" / "flux-kontext" / FILE
    first = it.hold("flag")
    it.worker.drain(True)  # so that nothing is prepared before the file is gone
    second = it.ask("flux-kontext")
    kept = file.read_bytes()
    file.unlink()
    it.worker.drain(False)
    try:
        assert "flux-kontext" in it.prefetched(second).failure
        assert it.status(first) == "running"
        it.let_go("flag")
        assert it.ends(first) == "succeeded"
        assert it.ends(second) == "failed"
        assert it.live_server.read(f"/api/jobs/{second}")["error"]["code"] == "WEIGHTS_UNUSABLE"
        it.books_are_right()
    finally:
        file.write_bytes(kept)


def test_a_cancel_of_the_job_that_was_prepared_for_leaves_its_weights_as_any_others(it: Watched):
    first, second = it.hold("flag"), it.ask("flux-dev")
    it.live_server.until(lambda: it.worker.prefetch)
    it.live_server.ask(f"/api/jobs/{second}/cancel")
    third = it.ask("flux-schnell")
    assert it.prefetched(third).failure == ""
    it.let_go("flag")
    assert [it.ends(each) for each in (first, second, third)] == ["succeeded", "cancelled", "succeeded"]
    assert it.keys_before(third) >= keys_of(it, "flux-schnell")
    it.books_are_right()


def test_an_evict_while_a_component_is_on_its_way_is_kept(it: Watched):
    first, second = it.hold("flag"), it.ask("flux-dev")
    preparation = it.live_server.until(lambda: it.worker.prefetch)
    key = preparation.pending[-1][0]
    it.worker.remove({key})
    it.worker.supervisor.send(Evict(key))
    it.prefetched(second)
    it.let_go("flag")
    assert (it.ends(first), it.ends(second)) == ("succeeded", "succeeded")
    it.books_are_right()


def test_a_worker_killed_while_it_prefetches_leaves_right_books_and_both_jobs_run(it: Watched):
    first, second = it.hold("flag"), it.ask("flux-dev")
    it.live_server.until(lambda: it.worker.prefetch)
    pid = it.worker.supervisor.pid or 0
    children = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    it.let_go("flag")
    assert (it.ends(first), it.ends(second)) == ("succeeded", "succeeded")
    it.live_server.until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    it.books_are_right()
