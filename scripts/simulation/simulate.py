"""How good the order of the queue is: the real `plan()` under a virtual clock, beside what others do.

Makespan is told over a proven lower bound, bytes over the least that any order must move.
"""

import argparse
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

from scripts.simulation import policies, timeline, workloads
from server.scheduling.fairness import Shares, jain_index, max_min_shares
from server.scheduling.plan import Policy, plan
from server.scheduling.simulation import Decide, Run, Simulation
from server.scheduling.types import Action, DeviceState, WaitingJob


def no_prefetch(
    waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares, policy: Policy = Policy()
) -> list[Action]:
    """The plan, but that each job's weights load when it starts."""
    return plan(waiting, devices, now, shares, replace(policy, min_prefetch_bytes=math.inf))


ORDERS: Mapping[str, Decide] = {
    "plantain": plan,
    "no prefetch": no_prefetch,
    "FIFO": policies.fifo,
    "LRU": policies.lru,
    "exhaustive": policies.exhaustive,
}


@dataclass(frozen=True)
class Figures:
    makespan_s: float
    over_bound: float
    switches: int
    over_least_bytes: float
    mean_s: float
    p95_s: float
    max_s: float
    jain: float


def main() -> None:
    options = parsed()
    names = list(workloads.WORKLOADS) if options.workload == "all" else [options.workload]
    for name in names:
        print(f"\n{name}: {options.devices} devices of {options.budget:g} GB, {options.link:g} GB/s{disk_of(options)}")
        print(" " * 16 + "makespan  x bound switches x bytes    mean     p95     max  Jain")
        for order, decide in ORDERS.items():
            show(order, *median([lived(name, options, decide, seed) for seed in range(options.seeds)]))


def disk_of(options: argparse.Namespace) -> str:
    return f", {options.host or math.inf:g} GB of copies each, disk {options.disk:g} GB/s" if options.disk else ""


def lived(name: str, options: argparse.Namespace, decide: Decide, seed: int) -> Figures:
    jobs = made(name, options, seed)
    boxes = workloads.devices(options.devices, options.budget, options.link, options.host)
    draws = options.svg and decide is plan
    if decide in (plan, no_prefetch):
        policy = Policy(**{field.name: getattr(options, field.name) for field in fields(Policy)})
        decide = partial(decide, policy=policy)
    disk = options.disk * workloads.GB if options.disk else math.inf
    world = Simulation(decide, {box.id: box for box in boxes}, disk_bytes_per_s=disk)
    runs = world.live(jobs)
    if draws:
        Path(options.svg).write_text(timeline.svg(runs, [box.id for box in boxes]))
    return figures(jobs, boxes, runs, world.fetched)


def median(all_figures: Sequence[Figures]) -> list[float]:
    return [statistics.median(values) for values in zip(*map(astuple, all_figures), strict=True)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "workload", nargs="?", default="all", help=f"{', '.join(workloads.WORKLOADS)}, a database, or all"
    )
    parser.add_argument("--jobs", type=int, default=1500)
    parser.add_argument("--load", type=float, default=1.1, help="work asked for, over what the devices can do")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--budget", type=float, default=46.0, help="GB to give out on each")
    parser.add_argument("--link", type=float, default=20.0, help="GB/s from host to device")
    parser.add_argument("--host", type=float, help="GB of host memory for each device's copies; without it, enough")
    parser.add_argument("--disk", type=float, help="GB/s at which weights without a copy are read; without it, no time")
    parser.add_argument("--seeds", type=int, default=5, help="worlds to live through; each figure is their median")
    parser.add_argument("--svg", help="write the timeline to this file")
    for field in fields(Policy):
        parser.add_argument(f"--{field.name}", type=float, default=field.default, help="of the plan's policy")
    return parser.parse_args()


def made(name: str, options: argparse.Namespace, seed: int) -> list[WaitingJob]:
    if name in workloads.WORKLOADS:
        return workloads.WORKLOADS[name](random.Random(seed), options.jobs, options.load, options.devices)
    return workloads.recorded(Path(name))


def figures(
    jobs: Sequence[WaitingJob], devices: Sequence[DeviceState], runs: Sequence[Run], fetched: Sequence[tuple[str, int]]
) -> Figures:
    """`fetched` are jobs with bytes that came for them while another one ran. A job for which weights came at all, then
    or at its start, is one switch, in however many parts they came."""
    waits = sorted(run.waited_s for run in runs)
    makespan_s = max(run.ends_at for run in runs)
    loads = [
        (job_id, size) for job_id, size in (*((run.job.job_id, run.loaded_bytes) for run in runs), *fetched) if size
    ]
    return Figures(
        makespan_s=makespan_s,
        over_bound=makespan_s / lower_bound_s(jobs, devices),
        switches=len({job_id for job_id, _ in loads}),
        over_least_bytes=sum(size for _, size in loads) / min_streamed_bytes(jobs),
        mean_s=statistics.mean(waits),
        p95_s=waits[int(0.95 * (len(waits) - 1))],
        max_s=waits[-1],
        jain=fairness(jobs, runs),
    )


def min_streamed_bytes(jobs: Sequence[WaitingJob]) -> int:
    """Every component that any job needs is copied once at least."""
    return sum(dict(entry for job in jobs for entry in job.need.components).values())


def lower_bound_s(jobs: Sequence[WaitingJob], devices: Sequence[DeviceState]) -> float:
    """No order can end sooner: what is released from some instant on must be computed from then on, all weights must
    be loaded once, though some beside the computing, and no job can be split or start before its own are there."""
    link = max(device.link_bytes_per_s for device in devices)
    by_age = sorted(jobs, key=lambda job: -job.created_at)
    bounds, left_s = [], 0.0
    for job in by_age:
        left_s += job.expected_s
        bounds.append(job.created_at + left_s / len(devices))
    bounds.append(min_streamed_bytes(jobs) / link / len(devices))
    bounds.append(max(max(job.created_at, job.need.weights_bytes / link) + job.expected_s for job in jobs))
    return max(bounds)


def fairness(jobs: Sequence[WaitingJob], runs: Sequence[Run]) -> float:
    """Jain's index of what each user got until the last job came, over what a fair division would have given them.

    Device-seconds, loads included. A fair division is max-min: nobody gets more than they asked for.
    """
    until = max(job.created_at for job in jobs) or max(run.ends_at for run in runs) / 2
    served: dict[str, float] = dict.fromkeys((job.user_id for job in jobs), 0.0)
    asked = dict.fromkeys(served, 0.0)
    for run in runs:
        served[run.job.user_id] += max(0.0, min(run.ends_at, until) - run.runs_at)
        asked[run.job.user_id] += run.job.expected_s
    entitled = max_min_shares(asked, sum(served.values()))
    return jain_index(served[user] / entitled[user] for user in served if entitled[user])


def show(order: str, makespan_s: float, over: float, switches: float, moved: float, *waits_s: float) -> None:
    *waits_s, fair = waits_s
    told = "".join(f"{wait_s:>8.1f}" for wait_s in waits_s)
    print(f"  {order:12}{makespan_s:>8.0f} s{over:>9.3f}{switches:>9.0f}{moved:>8.1f}{told}{fair:>6.2f}")


if __name__ == "__main__":
    main()
