"""Graceful shutdown on SIGTERM in a real process, and the immediate stop on a second one."""

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx

from server.settings import PROJECT

GENERATE = "/api/image/fal/generate"


class Served:
    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        assert process.stdout
        port, key = process.stdout.readline().split()
        self.process, self.folder = process, folder
        headers = {"Authorization": f"Bearer {key}", "Prefer": "respond-async"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)

    def submit(self, prompt: str) -> str:
        return self.client.post(GENERATE, json={"prompt": prompt, "model": "plain"}).raise_for_status().json()["id"]

    def until_running(self, job_id: str) -> None:
        while self.client.get(f"/api/jobs/{job_id}").json()["status"] != "running":
            time.sleep(0.02)

    def ask_to_stop(self) -> None:
        """Sends a signal and returns after the process has logged it."""
        assert self.process.stderr
        self.process.send_signal(signal.SIGTERM)
        assert any("SIGTERM" in line for line in self.process.stderr)

    def rows(self) -> list[tuple[str, int]]:
        with closing(sqlite3.connect(self.folder / "data/plantain.sqlite")) as db:
            return db.execute("SELECT status, attempts FROM job ORDER BY seq").fetchall()


@contextmanager
def serving(folder: Path, timeout_s: float = 30.0) -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.support.graceful_server", str(folder), str(timeout_s)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        served = Served(process, folder)
        with served.client:
            yield served
    finally:
        process.kill()
        process.wait()
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()


def test_the_running_job_is_finished_and_the_waiting_one_stays(tmp_path: Path):
    with serving(tmp_path) as it:
        first, _ = it.submit("slow 1.5"), it.submit("work")
        it.until_running(first)
        it.ask_to_stop()
        assert it.client.get("/healthz").status_code == 200, "it answers while it waits"
        assert it.client.post(GENERATE, json={"prompt": "x", "model": "plain"}).status_code == 503
        assert it.process.wait(20) in (0, -signal.SIGTERM)
        assert it.rows() == [("succeeded", 1), ("queued", 0)]


def test_a_second_signal_stops_at_once_and_costs_no_attempt(tmp_path: Path):
    with serving(tmp_path) as it:
        it.until_running(it.submit("slow 60"))
        it.ask_to_stop()
        started = time.monotonic()
        it.process.send_signal(signal.SIGTERM)
        it.process.wait(20)
        assert time.monotonic() - started < 10
        assert it.rows() == [("queued", 0)]


def test_the_shutdown_timeout(tmp_path: Path):
    with serving(tmp_path, timeout_s=0.5) as it:
        it.until_running(it.submit("slow 60"))
        it.process.send_signal(signal.SIGTERM)
        it.process.wait(20)
        assert it.rows() == [("queued", 0)]
