"""What `plan()` decides, as whole answers, and what it promises for any workload."""

from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.need import Need
from server.scheduling.placement import after_start
from server.scheduling.plan import plan
from server.scheduling.types import DeviceState, Evict, Refuse, Start, WaitingJob


def need(*keys: str, weights: int = 10, working: int = 5) -> Need:
    return Need(tuple((key, weights) for key in keys), working)


def waiting(job_id: str, *keys: str, **sizes: int) -> WaitingJob:
    return WaitingJob(job_id, need(*keys, **sizes))


def device(name: str, *resident: str, budget: int = 25, idle: bool = True) -> DeviceState:
    return DeviceState(name, budget, tuple((key, 10) for key in resident), idle)


def test_a_job_starts_on_an_idle_device():
    assert plan([waiting("j1", "a")], [device("gpu0")]) == [Start("j1", "gpu0")]


def test_nothing_starts_where_nothing_waits_or_nothing_is_idle():
    assert plan([], [device("gpu0")]) == []
    assert plan([waiting("j1", "a")], [device("gpu0", idle=False)]) == []


def test_the_oldest_job_goes_first():
    assert plan([waiting("j1", "a"), waiting("j2", "a")], [device("gpu0")]) == [Start("j1", "gpu0")]


def test_a_job_goes_where_its_weights_are():
    assert plan([waiting("j1", "b")], [device("gpu0", "a"), device("gpu1", "b")]) == [Start("j1", "gpu1")]


def test_a_cold_job_goes_where_most_room_is():
    assert plan([waiting("j1", "b")], [device("gpu0", "a"), device("gpu1")]) == [Start("j1", "gpu1")]


def test_the_least_recently_used_component_is_evicted_first_and_no_more_than_needed():
    box = device("gpu0", "old", "new")
    assert plan([waiting("j1", "a")], [box]) == [Evict("gpu0", "old"), Start("j1", "gpu0")]


def test_a_component_that_the_job_shares_is_kept_although_it_is_the_oldest():
    box = device("gpu0", "encoder", "dev")
    assert plan([waiting("j1", "encoder", "schnell")], [box]) == [Evict("gpu0", "dev"), Start("j1", "gpu0")]


def test_working_bytes_need_room_too():
    box = device("gpu0", "a", "b", budget=25)
    assert plan([waiting("j1", "a", working=15)], [box]) == [Evict("gpu0", "b"), Start("j1", "gpu0")]
    assert plan([waiting("j1", "a", working=5)], [box]) == [Start("j1", "gpu0")]


def test_a_job_that_no_device_could_hold_is_refused_with_the_numbers():
    assert plan([waiting("j1", "a", weights=99)], [device("gpu0")]) == [Refuse("j1", 104, 25)]


def test_a_job_for_the_large_busy_device_waits_and_a_younger_one_takes_the_small_idle_device():
    large, small = device("gpu0", budget=100, idle=False), device("gpu1", budget=20)
    assert plan([waiting("j1", "a", weights=50), waiting("j2", "b")], [large, small]) == [Start("j2", "gpu1")]


def test_jobs_spread_over_devices():
    jobs = [waiting("j1", "a"), waiting("j2", "a"), waiting("j3", "a")]
    assert plan(jobs, [device("gpu0"), device("gpu1")]) == [Start("j1", "gpu0"), Start("j2", "gpu1")]


KEYS = st.sampled_from("abcdef")
SIZES = dict(zip("abcdef", (1, 2, 3, 5, 8, 13), strict=True))
NEEDS = st.builds(
    lambda keys, working: Need(tuple((key, SIZES[key]) for key in sorted(keys)), working),
    st.sets(KEYS, min_size=1, max_size=4),
    st.integers(0, 10),
)
JOBS = st.lists(NEEDS, max_size=12).map(lambda needs: [WaitingJob(f"j{i}", each) for i, each in enumerate(needs)])
BOXES = st.lists(
    st.builds(
        lambda keys, budget, idle: (keys, budget, idle), st.permutations("abc"), st.integers(6, 40), st.booleans()
    ),
    min_size=1,
    max_size=4,
).map(
    lambda boxes: [
        DeviceState(f"gpu{i}", budget, tuple((key, SIZES[key]) for key in keys), idle)
        for i, (keys, budget, idle) in enumerate(boxes)
    ]
)


@given(JOBS, BOXES)
def test_whatever_waits_the_plan_keeps_its_promises(jobs: list[WaitingJob], boxes: list[DeviceState]):
    actions = plan(jobs, boxes)
    assert actions == plan(jobs, boxes), "same input, same plan"
    started = [action for action in actions if isinstance(action, Start)]
    assert len({start.device for start in started}) == len(started), "one job a device"
    assert len({start.job_id for start in started}) == len(started), "one device a job"
    needs, by_id = {job.job_id: job.need for job in jobs}, {box.id: box for box in boxes}
    for start in started:
        box, wanted = by_id[start.device], needs[start.job_id]
        evicted = {action.key for action in actions if isinstance(action, Evict) and action.device == box.id}
        assert box.idle
        assert not evicted & wanted.keys, "what the job needs is not evicted"
        loaded = after_start(box, wanted, evicted)
        assert loaded.free_bytes >= wanted.working_bytes, "never over budget"
    taken = {start.device for start in started}
    unstarted = [job for job in jobs if job.job_id not in {start.job_id for start in started}]
    for box in boxes:
        if box.idle and box.id not in taken:
            assert all(job.need.total_bytes > box.budget_bytes for job in unstarted), "no device idles for nothing"


def test_a_users_like_jobs_go_in_order_whatever_was_learned_between_their_submits():
    """The older one was submitted when such jobs were thought to take longer, and more memory."""
    older = WaitingJob("j1", need("a", working=6), "ada", expected_s=0.42, group="flux")
    newer = WaitingJob("j2", need("a", working=5), "ada", expected_s=0.40, group="flux")
    assert plan([older, newer], [device("gpu0")], now=99.0) == [Start("j1", "gpu0")]
    assert plan([older, newer], [device("gpu0"), device("gpu1")]) == [Start("j1", "gpu0"), Start("j2", "gpu1")]
