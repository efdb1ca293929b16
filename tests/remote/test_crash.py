"""A server process that is killed while fal has its job: nothing paid is lost, nothing is sent twice."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.settings import PROJECT
from tests.support.fal import KEY, FakeFal, wait_for
from tests.support.fal_server import picture

SERVE = """
import sys
import uvicorn
from server import services
from server.app import create_app
from server.settings import Settings, from_environment
made = services.build_services(Settings(**from_environment()), devices=[])
print(made.first_key, flush=True)
uvicorn.run(create_app(made), port=int(sys.argv[1]), log_level="warning")
"""


@pytest.fixture
def fal() -> Iterator[FakeFal]:
    with FakeFal().running() as fake:
        fake.result = {"images": [{"url": fake.serves("made.png", picture())}]}
        yield fake


class Process:
    """A server of its own, over one data folder; `kill` and `start` again."""

    def __init__(self, fal: FakeFal, data: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        fals = {"PLANTAIN_FAL_QUEUE_URL": f"{fal.url}/queue", "PLANTAIN_FAL_REST_URL": f"{fal.url}/rest"}
        self.environment = os.environ | fals | {"FAL_KEY": KEY, "PLANTAIN_DATA": str(data)}
        self.environment |= {"PLANTAIN_ALLOWED_NETWORKS": "127.0.0.0/8"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.start()
        self.client.headers["Authorization"] = f"Bearer {self.said}"

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.port)]
        self.process = subprocess.Popen(
            command, env=self.environment, cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout
        self.said = self.process.stdout.readline().strip()
        wait_for(self.answers, 60)

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/healthz").is_success
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def begin(self) -> str:
        body = {"prompt": "a", "model": "flux-pro"}
        answer = self.client.post("/api/image/fal/generate", json=body, headers={"Prefer": "respond-async"})
        return answer.json()["id"]

    def job(self, job_id: str) -> dict[str, object]:
        return self.client.get(f"/api/jobs/{job_id}").json()

    def kinds(self) -> list[str]:
        return [entry["kind"] for entry in self.client.get("/api/credits/ledger").json()["entries"]]


@pytest.fixture
def server(fal: FakeFal, tmp_path: Path) -> Iterator[Process]:
    started = Process(fal, tmp_path)
    yield started
    started.kill()
    started.client.close()


def test_a_killed_server_goes_on_with_what_fal_has(server: Process, fal: FakeFal):
    fal.hold = True
    job_id = server.begin()
    wait_for(lambda: server.job(job_id)["progress"])
    server.kill()
    fal.hold = False
    server.start()
    wait_for(lambda: server.job(job_id)["status"] == "succeeded")
    assert len(fal.submitted) == 1
    assert server.kinds() == ["charge", "grant", "grant"]


def test_a_server_killed_while_it_hands_over_does_not_send_again(server: Process, fal: FakeFal):
    fal.may_answer.clear()
    job_id = server.begin()
    wait_for(fal.accepts.is_set)
    server.kill()
    fal.may_answer.set()
    server.start()
    assert server.job(job_id)["error"]["code"] == "REMOTE_SUBMIT_UNKNOWN"  # type: ignore[index]
    assert len(fal.submitted) == 1
    assert server.kinds() == ["refund", "charge", "grant", "grant"]
