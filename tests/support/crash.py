"""Kill a busy server, or one of its workers, at random moments; then see whether anything was lost."""

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from PIL import Image

from tests.support import crash_server

PATIENCE_S = 60.0
SERVER_SHARE = 0.3
"""Of the kills, so many hit the server; the others one of its workers."""
BUSY_SHARE = 0.8
"""So many come while a job runs; the others at any moment, a start among them."""


@dataclass(frozen=True)
class Toll:
    """What came of it. `lost` is empty, or says what does not add up."""

    kills: Counter[str]
    jobs: Counter[str]
    lost: list[str]


class LiveServer:
    """The server's process. Forked from one that has imported all of it, so that it is up again at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.support.crash_server"])
        self.process: BaseProcess | None = None

    def start(self, finish: bool = False) -> BaseProcess:
        (self.folder / "up").unlink(missing_ok=True)
        self.process = self.context.Process(target=crash_server.run, args=(self.folder, finish))
        self.process.start()
        until(lambda: (self.folder / "up").exists() or not self.alive())
        return self.process

    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def workers(self) -> list[int]:
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(pid) for pid in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []


def strike(folder: Path, kills: int, seed: int = 0, successes: int = 0) -> Toll:
    """So many kills, time for so many jobs to succeed, then a start that finishes what is left, and the books."""
    rng, made, live_server = random.Random(seed), Counter[str](), LiveServer(folder)
    live_server.start()
    while made.total() < kills:
        if rng.random() < BUSY_SHARE:
            until(lambda: count(folder, "running") > 0)
        time.sleep(rng.uniform(0, 0.05))
        workers = live_server.workers()
        if rng.random() < SERVER_SHARE:
            os.kill(live_server.process.pid, signal.SIGKILL)  # type: ignore[union-attr, arg-type]
            live_server.process.join()  # type: ignore[union-attr]
            made["server"] += 1
            live_server.start()
        elif workers:
            kill_quietly(rng.choice(workers))
            made["worker"] += 1
    until(lambda: count(folder, "succeeded") >= successes)
    os.kill(live_server.process.pid, signal.SIGKILL)  # type: ignore[union-attr, arg-type]
    live_server.process.join()  # type: ignore[union-attr]
    last = live_server.start(finish=True)
    last.join(PATIENCE_S)
    assert last.exitcode == 0, f"the last server ended with {last.exitcode}"
    return audit(folder, made)


def audit(folder: Path, kills: Counter[str]) -> Toll:
    """Jobs, ledger and files against each other, and against what callers were answered."""
    db = sqlite3.connect(folder / "plantain.sqlite")
    db.row_factory = sqlite3.Row
    jobs = {row["id"]: row for row in db.execute("SELECT * FROM job")}
    entries = Counter((row["job_id"], row["kind"], row["amount"]) for row in db.execute("SELECT * FROM ledger"))
    outputs = {row["job_id"]: row["name"] for row in db.execute("SELECT * FROM file WHERE origin = 'output'")}
    lost = [f"accepted, and gone: {job_id}" for job_id in accepted(folder) - jobs.keys()]
    for job_id, job in jobs.items():
        ended = job["status"] in {"succeeded", "failed", "cancelled"}
        refunds = 0 if job["status"] == "succeeded" else 1
        if not ended:
            lost.append(f"never ended: {job_id} is {job['status']}")
        if entries[job_id, "charge", -job["credits"]] != 1:
            lost.append(f"not charged once: {job_id}")
        if entries[job_id, "refund", job["credits"]] != refunds:
            lost.append(f"not refunded {refunds} times: {job_id}")
        if (job_id in outputs) != (job["status"] == "succeeded"):
            lost.append(f"{job['status']}, with output {outputs.get(job_id)}: {job_id}")
    lost += [f"no picture: {name}" for name in outputs.values() if not is_picture(folder / "files" / name)]
    lost += [f"stray: {name}" for name in {path.name for path in (folder / "files").iterdir()} - {*outputs.values()}]
    (balance,) = db.execute("SELECT balance FROM user").fetchone()
    (total,) = db.execute("SELECT sum(amount) FROM ledger").fetchone()
    if balance != total:
        lost.append(f"balance {balance}, ledger {total}")
    return Toll(kills, Counter(job["status"] for job in jobs.values()), lost)


def count(folder: Path, status: str) -> int:
    with contextlib.closing(sqlite3.connect(folder / "plantain.sqlite", timeout=PATIENCE_S)) as db:
        return db.execute("SELECT count(*) FROM job WHERE status = ?", [status]).fetchone()[0]


def accepted(folder: Path) -> set[str]:
    """Whole lines only: the last one may have been cut."""
    return set((folder / "accepted").read_text().split("\n")[:-1])


def is_picture(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == (8, 8) and image.getpixel((0, 0)) == (255, 0, 0)
    except OSError:
        return False


def kill_quietly(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "the server did not come up"
        time.sleep(0.005)
