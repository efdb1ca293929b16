"""What a busy device brings for the next job: whole answers, and what holds on any workload."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from server.scheduling.fairness import Shares
from server.scheduling.need import Need, Phase
from server.scheduling.plan import Policy, plan
from server.scheduling.prefetch import plan_prefetch
from server.scheduling.simulation import Run, Simulation
from server.scheduling.types import Action, DeviceState, Evict, Prefetch, Start, WaitingJob
from tests.scheduling.test_fairness import BOXES, JOBS

EAGER, NEVER = Policy(min_prefetch_bytes=1), Policy(min_prefetch_bytes=float("inf"))


def need(*keys: str, working: int = 5) -> Need:
    return Need(tuple((key, 10) for key in keys), working)


def waiting(job_id: str, *keys: str, user: str = "ada", priority: int = 0) -> WaitingJob:
    return WaitingJob(job_id, need(*keys), user, priority=priority)


def busy(name: str, runs: Need, *others: str, budget: int = 100, free_at: float = 9.0, **more: object) -> DeviceState:
    """A device that runs a job; others' components were used before its own."""
    resident = (*((key, 10) for key in others), *runs.components)
    return DeviceState(name, budget, resident, idle=False, running_need=runs, free_at=free_at, **more)  # type: ignore[arg-type]


def planned(jobs: Sequence[WaitingJob], boxes: Sequence[DeviceState], policy: Policy = EAGER) -> list[Action]:
    return plan(jobs, boxes, policy=policy)


def test_a_busy_device_brings_what_the_next_job_lacks_in_the_order_of_its_phases():
    phases = (Phase("encode", ("t5",), 5), Phase("denoise", ("dev",), 5))
    job = WaitingJob("j1", Need((("dev", 10), ("t5", 10), ("a", 10)), 5, phases))
    assert planned([job], [busy("gpu0", need("a"))]) == [Prefetch("gpu0", "j1", ("t5", "dev"))]


def test_nothing_is_brought_where_all_is_there_or_nothing_waits():
    assert planned([waiting("j1", "a")], [busy("gpu0", need("a"))]) == []
    assert planned([], [busy("gpu0", need("a"))]) == []


def test_what_is_too_small_to_be_worth_it_is_left():
    assert planned([waiting("j1", "b")], [busy("gpu0", need("a"))], Policy(min_prefetch_bytes=11)) == []


def test_one_job_ahead_for_each_device_and_no_job_twice():
    boxes = [busy("gpu0", need("a"), prefetching_for="j1"), busy("gpu1", need("a"), free_at=3.0)]
    assert planned([waiting("j1", "b")], boxes) == []
    assert planned([waiting("j1", "b"), waiting("j2", "b")], boxes) == [Prefetch("gpu1", "j2", ("b",))]


def test_the_device_that_comes_free_first_prepares_for_the_next_job():
    boxes = [busy("gpu0", need("a")), busy("gpu1", need("a"), free_at=3.0)]
    jobs = [waiting("j1", "b"), waiting("front", "c", priority=1)]
    assert planned(jobs, boxes) == [Prefetch("gpu1", "front", ("c",)), Prefetch("gpu0", "j1", ("b",))]


def test_what_the_running_job_may_still_take_is_not_given_away():
    assert planned([waiting("j1", "b", "c")], [busy("gpu0", need("a", working=5), budget=35)]) == [
        Prefetch("gpu0", "j1", ("b", "c"))
    ]
    assert planned([waiting("j1", "b", "c")], [busy("gpu0", need("a", working=6), budget=35)]) == [
        Prefetch("gpu0", "j1", ("b",))
    ]
    assert planned([waiting("j1", "b")], [busy("gpu0", need("a", working=6), budget=25)]) == []


def test_nothing_is_evicted_for_it():
    assert planned([waiting("j1", "b")], [busy("gpu0", need("a"), "old", "new", budget=40)]) == []


def test_what_was_only_brought_is_no_reason_for_another_job_to_go_first():
    """But it is one for that job to go there."""
    a, b = WaitingJob("a1", need("a"), "ada", expected_s=2.0), WaitingJob("b1", need("b"), "ada", expected_s=1.0)
    box = DeviceState("gpu0", 50, (("b", 10), ("a", 10)), link_bytes_per_s=10.0)
    assert planned([a, b], [box])[0] == Start("b1", "gpu0")
    assert planned([a, b], [replace(box, prefetched=frozenset("b"))])[0] == Start("a1", "gpu0")
    cold = replace(box, id="gpu1", resident=(), prefetched=frozenset())
    assert planned([b], [cold, replace(box, prefetched=frozenset("b"))]) == [Start("b1", "gpu0")]


def test_where_the_device_has_no_room_the_host_gets_a_copy_beside_those_in_use():
    box = busy("gpu0", need("a"), budget=20, host_budget_bytes=20, host_copies=(("a", 10),))
    assert planned([waiting("j1", "b")], [box]) == [Prefetch("gpu0", "j1", (), ("b",))]
    assert planned([waiting("j1", "b")], [replace(box, host_budget_bytes=19)]) == []
    assert planned([waiting("j1", "b")], [replace(box, host_copies=(("a", 10), ("b", 10)))]) == []


def test_a_job_that_runs_with_some_of_its_weights_only_gets_copies_in_host_memory_prepared():
    phases = (Phase("encode", ("t5",), 1), Phase("denoise", ("dev",), 1))
    staged = Need((("t5", 10), ("dev", 10)), 1, phases)
    box = DeviceState("gpu0", 15, (("x", 1),), idle=False, running_need=need("x", working=1), host_budget_bytes=40)
    assert planned([WaitingJob("j1", staged)], [replace(box, running_need=Need((("x", 1),), 1))]) == [
        Prefetch("gpu0", "j1", (), ("t5", "dev"))
    ]


def test_a_device_that_is_taken_out_or_has_no_job_prepares_nothing():
    assert planned([waiting("j1", "b")], [DeviceState("gpu0", 100, idle=False)]) == []


def test_a_job_that_can_start_does_and_only_others_are_prepared_for():
    boxes = [busy("gpu0", need("a")), DeviceState("gpu1", 100)]
    assert planned([waiting("j1", "b"), waiting("j2", "b")], boxes) == [
        Start("j1", "gpu1"), Prefetch("gpu0", "j2", ("b",)),
    ]  # fmt: skip


# Any workload


def lived(jobs: Sequence[WaitingJob], boxes: Sequence[DeviceState], policy: Policy) -> list[Run]:
    return Simulation(partial(plan, policy=policy), {box.id: box for box in boxes}).live(jobs)


HOSTED = st.sampled_from([None, 19, 30])


@settings(max_examples=200, deadline=None)
@given(JOBS, BOXES, HOSTED)
def test_no_budget_is_ever_passed_and_nothing_in_use_is_taken(
    jobs: list[WaitingJob], boxes: list[DeviceState], host: int | None
):
    world = Simulation(
        lambda *_: [], {box.id: replace(box, host_budget_bytes=host) for box in boxes}, disk_bytes_per_s=2.0
    )

    def watched(
        waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares
    ) -> list[Action]:
        actions = plan(waiting, devices, now, shares, EAGER)
        assert actions == plan(list(waiting), list(devices), now, shares, EAGER), "same input, same plan"
        started = {action.job_id for action in actions if isinstance(action, Start)}
        bare = plan(waiting, devices, now, shares, NEVER)
        assert started == {action.job_id for action in bare if isinstance(action, Start)}, "it delays no start"
        for action in actions:
            box = world.devices[getattr(action, "device", boxes[0].id)]
            if isinstance(action, Evict) and box.running_need:
                assert action.key not in box.running_need.keys, "what runs keeps its weights"
            if isinstance(action, Prefetch):
                assert box.running_need and not box.prefetching_for and action.job_id not in started, (
                    "one ahead, of those that wait"
                )
        for box in devices:
            held_back = box.running_need.working_bytes if box.running_need else 0
            assert box.free_bytes >= held_back, "never over budget, whatever the running job takes"
            assert sum(size for _, size in box.host_copies) <= (box.host_budget_bytes or 10**9), "nor the host's"
        return actions

    world.decide = watched
    runs = world.live(jobs)
    fitting = [job for job in jobs if any(max(job.need.sizes.values()) <= (host or 99) for _ in boxes)]
    assert {run.job.job_id for run in runs} <= {job.job_id for job in fitting}
    assert len(runs) == len({run.job.job_id for run in runs}), "every job runs once"


@settings(max_examples=150, deadline=None)
@given(JOBS, BOXES, st.sampled_from([0.0, 5.0, 50.0]))
def test_nobody_waits_longer_than_promised_with_prefetch_either(
    jobs: list[WaitingJob], boxes: list[DeviceState], cap_s: float
):
    """The formula of `docs/scheduling.md`, with R as it is without prefetch: it only makes loading shorter."""
    from tests.scheduling.test_fairness import able_count, earlier

    runs = lived(jobs, boxes, replace(EAGER, max_wait_s=cap_s))
    assert sorted(run.job.job_id for run in runs) == sorted(job.job_id for job in jobs)
    link = min(box.link_bytes_per_s for box in boxes)
    longest_s = max(job.expected_s + job.need.weights_bytes / link for job in jobs)
    users = {job.user_id for job in jobs}
    for run in runs:
        assert run.ends_at - run.starts_at <= longest_s + 1e-6, "no run is longer than with all of its loading"
        own = [other for other in runs if other.job.user_id == run.job.user_id]
        before = [each for each in own if each.starts_at >= run.job.created_at and earlier(each.job, run.job, jobs)]
        k = min(able_count(each.job, boxes) for each in own)
        promised_s = (len(before) + 1) * (cap_s + longest_s * (1 + (len(users) - 1) / k))
        assert run.waited_s <= promised_s + 1e-6


def test_what_is_brought_meanwhile_is_not_waited_for():
    jobs = [WaitingJob(f"j{n}", need("ab"[n]), expected_s=10.0) for n in range(2)]
    boxes = [DeviceState("gpu0", 50, link_bytes_per_s=5.0)]
    with_it, without = lived(jobs, boxes, EAGER), lived(jobs, boxes, NEVER)
    assert [run.ends_at for run in without] == [12.0, 24.0]
    assert [run.ends_at for run in with_it] == [12.0, 22.0]


def test_what_is_not_brought_in_time_is_waited_for_in_part():
    jobs = [WaitingJob("j0", need("a"), expected_s=1.0), WaitingJob("j1", need("b"), expected_s=1.0)]
    runs = lived(jobs, [DeviceState("gpu0", 50, link_bytes_per_s=5.0)], EAGER)
    assert [(run.starts_at, run.runs_at, run.ends_at) for run in runs] == [(0.0, 2.0, 3.0), (3.0, 4.0, 5.0)]


def test_an_empty_answer_is_none():
    assert plan_prefetch("j1", need("a"), busy("gpu0", need("a")), 1) is None
