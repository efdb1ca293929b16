"""Made-up days of a studio, and recorded ones. Sizes are the models' own, times those of one 48 GB card."""

import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from server.scheduling.need import Need
from server.scheduling.types import DeviceState, WaitingJob

GB = 10**9
T5, CLIP, FLUX_VAE = ("t5-xxl", int(9.5 * GB)), ("clip-l", GB // 4), ("flux-vae", GB // 6)
UMT5, WAN_VAE = ("umt5-xxl", int(11.4 * GB)), ("wan-vae", GB // 2)
FLUX = (T5, CLIP, FLUX_VAE)
MODELS: dict[str, tuple[Need, float, int]] = {  # what it needs, how long it takes, how often it is asked for
    "flux-schnell": (Need((*FLUX, ("schnell", int(23.8 * GB))), 2 * GB), 1.2, 30),
    "flux-dev": (Need((*FLUX, ("dev", int(23.8 * GB))), 2 * GB), 6.0, 20),
    "flux-kontext": (Need((*FLUX, ("kontext", int(23.8 * GB))), 3 * GB), 9.0, 15),
    "upscale": (Need((("esrgan", GB // 15),), 2 * GB), 1.0, 12),
    "remove-bg": (Need((("u2net", GB // 5),), GB), 0.3, 12),
    "ltx": (Need((T5, ("ltx-vae", int(1.7 * GB)), ("ltx", int(3.8 * GB))), 5 * GB), 8.0, 6),
    "wan-1.3b": (Need((UMT5, WAN_VAE, ("wan-1.3b", int(2.8 * GB))), 6 * GB), 45.0, 2),
    "wan-14b": (Need((UMT5, WAN_VAE, ("wan-14b", int(28.6 * GB))), 5 * GB), 200.0, 1),
}
USERS = [f"user{n}" for n in range(10)]


def devices(count: int, budget_gb: float, link_gb_per_s: float, host_gb: float | None = None) -> list[DeviceState]:
    host_bytes = int(host_gb * GB) if host_gb else None
    return [
        DeviceState(f"gpu{n}", int(budget_gb * GB), link_bytes_per_s=link_gb_per_s * GB, host_budget_bytes=host_bytes)
        for n in range(count)
    ]


def job(number: int, model: str, user_id: str, at: float) -> WaitingJob:
    need, expected_s, _ = MODELS[model]
    return WaitingJob(f"job{number}", need, user_id, expected_s=expected_s, created_at=at)


def mixed(rng: random.Random, jobs: int, load: float, count: int) -> list[WaitingJob]:
    """Ten alike users, all models, Poisson."""
    return [
        job(n, any_model(rng), rng.choice(USERS), at) for n, at in enumerate(islice(poisson(rng, load, count), jobs))
    ]


def bursty(rng: random.Random, jobs: int, load: float, count: int) -> list[WaitingJob]:
    """Batches of one to twenty jobs of one user and model; batches come as a Poisson process."""
    made: list[WaitingJob] = []
    for at in poisson(rng, load / 10.5, count):
        model, user_id = any_model(rng), rng.choice(USERS)
        made += [job(len(made) + n, model, user_id, at) for n in range(rng.randint(1, 20))]
        if len(made) >= jobs:
            return made[:jobs]
    raise AssertionError


def greedy(rng: random.Random, jobs: int, load: float, count: int) -> list[WaitingJob]:
    """One of ten asks at the start for twice what all the others do, who ask for 0.7 of the devices as time goes on."""
    moments = poisson(rng, 0.7 * load, count, list(MODELS)[:5])
    others = [job(n, any_image(rng), rng.choice(USERS[1:]), at) for n, at in enumerate(islice(moments, jobs // 3))]
    count_of_batch = int(2 * sum(each.expected_s for each in others) / MODELS["flux-dev"][1])
    return [*(job(jobs + n, "flux-dev", USERS[0], 0.0) for n in range(count_of_batch)), *others]


def adversarial(rng: random.Random, jobs: int, load: float, count: int) -> list[WaitingJob]:
    """A-B-A-C: no two neighbours in the queue share a transformer."""
    turn = ["flux-schnell", "flux-dev", "flux-schnell", "flux-kontext"]
    return [
        job(n, turn[n % 4], USERS[n % 10], at) for n, at in enumerate(islice(poisson(rng, load, count, turn), jobs))
    ]


def recorded(path: Path) -> list[WaitingJob]:
    """The jobs that a server's database says succeeded, with the times they took; of the models that are known here."""
    rows = sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute(
        "SELECT id, model, user_id, created_at, finished_at - started_at FROM job"
        " WHERE status = 'succeeded' ORDER BY created_at"
    )
    known = [row for row in rows if row[1] in MODELS]
    return [
        WaitingJob(name, MODELS[model][0], user, expected_s=took_s, created_at=at - known[0][3])
        for name, model, user, at, took_s in known
    ]


WORKLOADS: dict[str, Callable[[random.Random, int, float, int], list[WaitingJob]]] = {
    "mixed": mixed, "bursty": bursty, "greedy": greedy, "adversarial": adversarial,
}  # fmt: skip


def poisson(rng: random.Random, load: float, count: int, among: Sequence[str] = tuple(MODELS)) -> Iterator[float]:
    """Instants of arrival that ask for `load` of what `count` devices can do, of jobs as frequent as `MODELS` says."""
    often = sum(MODELS[name][2] for name in among)
    mean_s = sum(MODELS[name][1] * MODELS[name][2] for name in among) / often
    at = 0.0
    while True:
        yield at
        at += rng.expovariate(load * count / mean_s)


def any_model(rng: random.Random) -> str:
    return rng.choices(list(MODELS), [often for _, _, often in MODELS.values()])[0]


def any_image(rng: random.Random) -> str:
    return rng.choices(list(MODELS)[:5], [often for _, _, often in list(MODELS.values())[:5]])[0]
