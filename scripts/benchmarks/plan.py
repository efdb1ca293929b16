"""What a full queue costs: one decision, and one status request, with 10,000 jobs waiting.

Prints milliseconds, and each as a share of the 5 ms that it may take.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

from pipelines.base import Component, Weights
from server import services
from server.accounts import users
from server.jobs.job import NewJob
from server.model_registry import RunSpec
from server.scheduling.need import Need
from server.scheduling.plan import plan
from server.scheduling.types import DeviceState, WaitingJob
from server.settings import Settings
from tests.support.server import CPU, serving

GIB = 2**30

JOBS = 10_000
AIM_MS = 5.0


def main() -> None:
    for name, waiting, devices in decisions():
        show(f"plan(), {name}", median_ms(lambda w=waiting, d=devices: plan(w, d)))  # type: ignore[misc]
    show("GET /api/jobs/{id} of the last of them, over a socket", status_ms())


def decisions() -> list[tuple[str, list[WaitingJob], list[DeviceState]]]:
    """Mixed queues: ten models that share an encoder, jobs of several sizes."""
    needs = [Need((("encoder", 10 * GIB), (f"transformer-{n}", (2 + n) * GIB)), GIB) for n in range(10)]
    mixed = [WaitingJob(f"job_{n}", needs[n % 10], f"user_{n % 97}", created_at=n) for n in range(JOBS)]
    large = [WaitingJob(f"job_{n}", needs[9], f"user_{n % 97}", created_at=n) for n in range(JOBS)]
    resident = tuple((f"transformer-{n}", (2 + n) * GIB) for n in range(3))
    eight = [DeviceState(f"gpu{n}", 48 * GIB, resident) for n in range(8)]
    small = [DeviceState("gpu0", 80 * GIB, resident, idle=False), DeviceState("gpu1", 12 * GIB)]
    return [
        ("8 idle devices", mixed, eight),
        ("8 busy devices", mixed, [DeviceState(each.id, each.budget_bytes, resident, idle=False) for each in eight]),
        ("8 busy devices that prepare for the next jobs", mixed, preparing(eight, needs)),
        ("an idle device that is too small for all of them", large, small),
    ]


def preparing(devices: list[DeviceState], needs: list[Need]) -> list[DeviceState]:
    """The same devices, each with a job that leaves room for another one's weights."""
    return [replace(each, idle=False, running_need=needs[0], free_at=float(n)) for n, each in enumerate(devices)]


def status_ms() -> float:
    with tempfile.TemporaryDirectory() as folder:
        made = services.build_services(Settings(data=Path(folder)), [CPU])
        user = users.user_by_email(made.database.db, "owner@localhost")
        weights = Weights("wayward", "tests.families.scripted", Path("x"), (Component("network", "a", 1, Path("x")),))
        made.shelf.runnable = lambda *_: RunSpec(weights, Need((("a", 1),), 1))  # type: ignore[method-assign]
        made.dispatcher.state.workers["cpu"].supervisor.start = lambda: None  # type: ignore[method-assign]
        for number in range(JOBS):
            made.jobs.insert(job(number, user, made.files.new_name(".png")), time.time())
        with serving(made) as address, httpx.Client(base_url=address) as client:
            client.headers["Authorization"] = f"Bearer {made.first_key}"
            last = f"/api/jobs/job_{JOBS - 1}"
            assert client.get(last).json()["queue"]["position"] == JOBS
            return median_ms(lambda: client.get(last))


def job(number: int, user: str, output: str) -> NewJob:
    return NewJob(f"job_{number}", user, None, "image", "x", "text-to-image", {"seed": 1}, 1, output, 0)


def median_ms(act: Callable[[], object], times: int = 50) -> float:
    act()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        spent.append((time.perf_counter() - start) * 1000)
    return statistics.median(spent)


def show(what: str, ms: float) -> None:
    print(f"{what}: {ms:.2f} ms, {ms / AIM_MS:.2f} of the aim ({AIM_MS:.0f} ms), {JOBS:,} jobs queued")


if __name__ == "__main__":
    main()
