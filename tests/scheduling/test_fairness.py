"""Whose turn it is: the numbered cases of `plan()`, and the promise of `docs/scheduling.md` on any workload."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from server.scheduling.fairness import Shares, jain_index, max_min_shares
from server.scheduling.need import Need
from server.scheduling.plan import Policy, plan
from server.scheduling.simulation import Run, Simulation
from server.scheduling.types import DeviceState, Evict, Start, WaitingJob

FAST_LINK = 1e9
A, B = Need((("a", 10),), 1), Need((("b", 10),), 1)


def waiting(job_id: str, user: str = "ada", need: Need = A, **known: float) -> WaitingJob:
    return WaitingJob(job_id, need, user, **known)  # type: ignore[arg-type]


def device(name: str = "gpu0", *resident: str, budget: int = 15, link: float = FAST_LINK) -> DeviceState:
    return DeviceState(name, budget, tuple((key, 10) for key in resident), link_bytes_per_s=link)


def lived(jobs: Sequence[WaitingJob], boxes: Sequence[DeviceState], policy: Policy = Policy()) -> list[Run]:
    return Simulation(partial(plan, policy=policy), {box.id: box for box in boxes}).live(jobs)


def order(runs: Sequence[Run]) -> list[str]:
    return [run.job.job_id for run in runs]


def test_whoever_has_had_least_goes_first():
    jobs = [waiting("a1", "ada"), waiting("b1", "bob")]
    assert plan(jobs, [device()], shares=Shares(virtual_time_s={"ada": 5.0, "bob": 2.0})) == [Start("b1", "gpu0")]


def test_a_batch_does_not_hold_up_the_others():
    batch = [waiting(f"a{n}", "ada") for n in range(4)]
    assert order(lived([*batch, waiting("b1", "bob"), waiting("c1", "cy")], [device()]))[:3] == ["a0", "b1", "c1"]


def test_device_seconds_count_and_not_jobs():
    long = [waiting(f"a{n}", "ada", expected_s=4.0) for n in range(3)]
    short = [waiting(f"b{n}", "bob", expected_s=1.0) for n in range(8)]
    runs = lived([*long, *short], [device()], Policy(length_bias=0.0))
    assert order(runs)[:7] == ["a0", "b0", "b1", "b2", "b3", "a1", "b4"]


def test_a_plan_with_twice_the_weight_gets_twice_the_time():
    jobs = [waiting(f"a{n}", "ada", weight=2.0) for n in range(20)] + [waiting(f"b{n}", "bob") for n in range(20)]
    first = order(lived(jobs, [device()]))[:15]
    assert sum(job_id.startswith("a") for job_id in first) == 10


def test_whoever_comes_back_starts_level_with_the_others():
    early = [waiting(f"a{n}", "ada") for n in range(10)]
    late = [waiting(f"b{n}", "bob", created_at=5.0) for n in range(10)]
    runs = order(lived([*early, *late], [device()]))
    assert runs[:5] == ["a0", "a1", "a2", "a3", "a4"]
    assert sum(job_id.startswith("b") for job_id in runs[5:11]) in (3, 4), "no more than a share, for having been away"


def test_short_jobs_go_before_long_ones_of_users_who_have_had_the_same():
    jobs = [waiting("film", "ada", expected_s=100.0), waiting("picture", "bob", expected_s=1.0)]
    assert order(lived(jobs, [device()])) == ["picture", "film"]


def test_long_jobs_leave_half_of_the_devices_to_short_ones():
    films = [waiting(f"film{n}", expected_s=200.0) for n in range(3)]
    boxes = [replace(device("gpu0"), idle=False, running_expected_s=200.0), device("gpu1")]
    assert plan([*films, waiting("picture", "bob", B)], boxes) == [Start("picture", "gpu1")]
    assert plan(films, boxes) == [Start("film0", "gpu1")], "but nothing idles for nothing"


def test_a_device_stays_with_its_weights_and_leaves_before_it_would_be_unfair():
    """Loading takes 0.1 s, 20 s with the quantum: so far may ada get ahead of bob, or less if his job waits."""
    jobs = [waiting(f"a{n}", "ada", A) for n in range(40)] + [waiting("b1", "bob", B)]
    boxes = [device("gpu0", "a", link=100.0)]
    assert 15 <= order(lived(jobs, boxes, Policy(switch_penalty_decay=0.0))).index("b1") <= 21
    assert 2 <= order(lived(jobs, boxes, Policy(switch_penalty_decay=5.0))).index("b1") <= 4


def test_an_admin_puts_jobs_in_front_and_behind():
    jobs = [waiting("back", priority=-1), waiting("plain", "bob"), waiting("front", "cy", priority=1)]
    assert order(lived(jobs, [device()])) == ["front", "plain", "back"]


def test_whoever_waits_for_too_long_goes_next_whatever_it_costs():
    jobs = [waiting("old", "ada", B, created_at=0.0), waiting("warm", "bob", A, created_at=90.0)]
    policy, far_ahead = Policy(max_wait_s=60.0), Shares(virtual_time_s={"ada": 1e6, "bob": 0.0})
    assert plan(jobs, [device("gpu0", "a")], 59.0, far_ahead, policy) == [Start("warm", "gpu0")]
    assert plan(jobs, [device("gpu0", "a")], 61.0, far_ahead, policy) == [Evict("gpu0", "a"), Start("old", "gpu0")]


def test_the_turn_of_an_overdue_batch_comes_once_and_then_it_is_another_one_s():
    jobs = [waiting("a1", created_at=0.0), waiting("a2", created_at=0.0), waiting("b1", "bob", created_at=10.0)]
    late = Shares(virtual_time_s={"ada": 0.0, "bob": 1e6}, last_start_at={"ada": 50.0})
    assert plan(jobs[1:], [device()], 60.0, late, Policy(max_wait_s=20.0)) == [Start("b1", "gpu0")]


def test_fair_divisions_and_how_fair_one_is():
    assert max_min_shares({"ada": 1.0, "bob": 9.0, "cy": 9.0}, 9.0) == {"ada": 1.0, "bob": 4.0, "cy": 4.0}
    assert (jain_index([1, 1, 1, 1]), jain_index([1, 0, 0, 0])) == (1.0, 0.25)


SIZES = dict(zip("abcde", (1, 2, 3, 5, 8), strict=True))
JOBS = st.lists(
    st.builds(
        lambda keys, user, length_s, at, weight, priority: WaitingJob(
            "",
            Need(tuple((key, SIZES[key]) for key in sorted(keys)), 1),
            user,
            weight,
            priority,
            expected_s=length_s,
            created_at=at,
        ),
        st.sets(st.sampled_from("abcde"), min_size=1, max_size=3),
        st.sampled_from(["ada", "bob", "cy", "dee"]),
        st.sampled_from([0.1, 1.0, 3.0, 40.0]),
        st.sampled_from([0.0, 0.5, 2.0, 7.0, 30.0, 100.0]),
        st.sampled_from([1.0, 2.0, 8.0]),
        st.sampled_from([0, 0, 0, -1]),
    ),
    min_size=1,
    max_size=25,
).map(lambda jobs: [replace(job, job_id=f"j{index}") for index, job in enumerate(jobs)])
BOXES = st.lists(st.integers(18, 30), min_size=1, max_size=4).map(
    lambda budgets: [
        DeviceState(f"gpu{n}", budget if n == 0 else budget - 12, link_bytes_per_s=4.0)
        for n, budget in enumerate(budgets)
    ]
)


def able_count(job: WaitingJob, boxes: Sequence[DeviceState]) -> int:
    return sum(job.need.total_bytes <= box.budget_bytes for box in boxes)


@settings(max_examples=300, deadline=None)
@given(JOBS, BOXES, st.sampled_from([0.0, 5.0, 50.0]))
def test_nobody_waits_longer_than_promised(jobs: list[WaitingJob], boxes: list[DeviceState], cap_s: float):
    """The formula of `docs/scheduling.md`, whatever comes: (own jobs before it + 1) x (A + R x (1 + (U - 1) / k))."""
    runs = lived(jobs, boxes, Policy(max_wait_s=cap_s))
    assert sorted(order(runs)) == sorted(job.job_id for job in jobs), "every job runs, once"
    longest_s = max(run.ends_at - run.starts_at for run in runs)
    users = {job.user_id for job in jobs}
    for run in runs:
        own = [other for other in runs if other.job.user_id == run.job.user_id]
        came_at = run.job.created_at
        before = [each for each in own if each.starts_at >= came_at and earlier(each.job, run.job, jobs)]
        k = min(able_count(each.job, boxes) for each in own)
        promised_s = (len(before) + 1) * (cap_s + longest_s * (1 + (len(users) - 1) / k))
        assert run.waited_s <= promised_s + 1e-6


def earlier(one: WaitingJob, other: WaitingJob, jobs: Sequence[WaitingJob]) -> bool:
    return (one.created_at, int(one.job_id[1:])) < (other.created_at, int(other.job_id[1:]))


@settings(max_examples=150, deadline=None)
@given(JOBS, BOXES)
def test_no_device_idles_or_overflows_at_any_moment(jobs: list[WaitingJob], boxes: list[DeviceState]):
    def watched(
        waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares
    ) -> Sequence[object]:
        actions = plan(waiting, devices, now, shares)
        assert actions == plan(list(waiting), list(devices), now, shares), "same input, same plan"
        started = {action.job_id: action.device for action in actions if isinstance(action, Start)}
        left = [job for job in waiting if job.job_id not in started]
        for box in devices:
            if box.idle and box.id not in started.values():
                assert not any(job.need.total_bytes <= box.budget_bytes for job in left), "no device idles for nothing"
            assert box.free_bytes >= 0, "never over budget"
        return actions

    Simulation(watched, {box.id: box for box in boxes}).live(jobs)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=5, max_size=5))
def test_users_who_always_wait_get_the_same_but_for_one_round(users: int, devices: int, lengths_s: list[float]):
    """Whatever the lengths of their jobs."""
    jobs = [
        waiting(f"{user}-{n}", f"user{user}", expected_s=lengths_s[user]) for user in range(users) for n in range(40)
    ]
    boxes = [device(f"gpu{n}", "a") for n in range(devices)]
    runs = lived(jobs, boxes, Policy(length_bias=0.0, max_wait_s=1e9))
    until_s = min(max(run.ends_at for run in runs if run.job.user_id == f"user{user}") for user in range(users))
    served = [
        sum(run.job.expected_s for run in runs if run.job.user_id == f"user{user}" and run.starts_at < until_s)
        for user in range(users)
    ]
    assert max(served) - min(served) <= (devices + 1) * 2 * max(lengths_s)
