"""A server on a real socket for Better Auth's official client on Node, and that client's packages."""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server import services
from server.app import create_app
from server.services import Services
from server.settings import Settings

FOLDER = Path(__file__).parents[1] / "better_auth"
INSTALL = ["npm", "install", "--no-package-lock", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund"]
PATIENCE_S = 120.0


@dataclass
class MovableClock:
    """The real time plus `ahead_s`."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass
class AuthServer:
    address: str
    made: Services
    clock: MovableClock
    data: Path

    def newest_mail(self) -> dict[str, str]:
        """The last mail. Waits for background work: mails are sent after the response."""
        for task in list(self.made.auth.mailer._tasks):
            while not task.done():
                time.sleep(0.005)
        return json.loads((self.data / "outbox.log").read_text().splitlines()[-1])


@contextlib.contextmanager
def auth_server(data: Path, **options: Any) -> Iterator[AuthServer]:
    """Serves from a thread, without workers, until the block ends."""
    clock = MovableClock()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = listener.getsockname()[1]
        settings = dataclasses.replace(Settings(data=data, port=port, limit_sign_in=False), **options)
        made = services.build_services(settings, devices=[], clock=clock)
        server = uvicorn.Server(uvicorn.Config(create_app(made), log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield AuthServer(f"http://127.0.0.1:{port}", made, clock, data)
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Report:
    """The checks of a script, and the reasons of those that failed."""

    checked: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_checks(script: str, package: str, served: AuthServer) -> Report:
    """Runs a script of `tests/better_auth` and handles its requests: advance the clock, read the newest mail."""
    report = Report()
    command = ["node", script, package, served.address]
    with subprocess.Popen(command, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdin and node.stdout
        for line in node.stdout:
            message = json.loads(line)
            if "ask" in message:
                node.stdin.write(json.dumps(_handle_request(served, message)) + "\n")
                node.stdin.flush()
            elif "check" in message:
                report.checked.append(message["check"])
                if not message["ok"]:
                    report.failed[message["check"]] = message["why"]
            else:
                break
        assert node.wait(PATIENCE_S) == 0
    return report


def node_output(*arguments: str) -> str:
    return subprocess.run(["node", *arguments], cwd=FOLDER, check=True, capture_output=True, text=True).stdout


def installed() -> None:
    """Installs the packages on first use. If that is impossible, skips with the reason; on CI, fails."""
    wanted = (FOLDER / "package.json").read_text()
    mark = FOLDER / "node_modules" / ".installed"
    if not (shutil.which("node") and shutil.which("npm")):
        return _skip_or_fail("there is no node and npm")
    if mark.exists() and mark.read_text() == wanted:
        return None
    done = subprocess.run(INSTALL, cwd=FOLDER, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        return _skip_or_fail(f"npm cannot install the client: {done.stderr[-400:]}")
    mark.write_text(wanted)
    return None


def _skip_or_fail(reason: str) -> None:
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def _handle_request(served: AuthServer, asked: dict[str, Any]) -> Any:
    if asked["ask"] == "advance":
        served.clock.ahead_s += asked["value"]
        return "done"
    return served.newest_mail()
