"""The aims of `docs/scheduling.md`; and the bound that makespans are told over."""

import argparse
from functools import cache

import pytest

from scripts.simulation import simulate, workloads
from scripts.simulation.policies import fifo
from scripts.simulation.simulate import Figures, lower_bound_s
from server.scheduling.plan import Policy, plan
from server.scheduling.simulation import Decide, Simulation

OPTIONS = argparse.Namespace(
    **vars(Policy()), load=1.1, devices=4, budget=46.0, link=20.0, host=None, disk=None, svg=None
)


LENGTHS = pytest.mark.parametrize("jobs", [800, pytest.param(1500, marks=pytest.mark.slow)])


@cache
def lived(name: str, decide: Decide, jobs: int) -> Figures:
    options = argparse.Namespace(**vars(OPTIONS), jobs=jobs)
    return Figures(*simulate.median([simulate.lived(name, options, decide, seed) for seed in range(3)]))  # type: ignore[arg-type]


@LENGTHS
def test_the_devices_are_well_used(jobs: int):
    assert lived("mixed", plan, jobs).over_bound <= 1.15
    assert lived("mixed", plan, jobs).switches < lived("mixed", fifo, jobs).switches * 0.6


@LENGTHS
def test_people_wait_a_third_of_what_they_would_behind_one_another(jobs: int):
    assert lived("mixed", plan, jobs).p95_s <= lived("mixed", fifo, jobs).p95_s / 3


@LENGTHS
def test_one_greedy_user_of_ten_takes_nothing_from_the_others(jobs: int):
    assert lived("greedy", plan, jobs).jain >= 0.95
    assert lived("greedy", fifo, jobs).jain < 0.5


def test_no_order_beats_the_bound():
    for name in workloads.WORKLOADS:
        jobs = simulate.made(name, argparse.Namespace(**{**vars(OPTIONS), "jobs": 60}), 0)
        boxes = workloads.devices(3, 46.0, 20.0)
        for decide in simulate.ORDERS.values():
            runs = Simulation(decide, {box.id: box for box in boxes}).live(jobs)
            assert max(run.ends_at for run in runs) >= lower_bound_s(jobs, boxes) - 1e-6
