"""Expected starts and the times that they come from."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.scheduling.estimates import DurationEstimate, DurationEstimates, progress_timeout_s
from server.scheduling.fairness import FairShareAccounting
from server.scheduling.forecast import HORIZON, QueuePosition, forecast, reason
from server.scheduling.need import Need
from server.scheduling.plan import plan
from server.scheduling.simulation import Simulation
from server.scheduling.types import DeviceState, WaitingJob

GIB = 2**30
A, LARGE = Need((("a", 10),), 1), Need((("b", 12 * GIB),), 2 * GIB)
TITLES = {"gpu0": "GPU 0", "gpu1": "GPU 1"}


def waiting(number: int, user: str = "ada", expected_s: float = 10.0, need: Need = A) -> WaitingJob:
    return WaitingJob(f"j{number}", need, user, expected_s=expected_s)


def busy(name: str, budget: int = 20) -> DeviceState:
    return DeviceState(name, budget, (("a", 10),), idle=False)


def test_jobs_start_as_devices_come_free():
    places = forecast(
        [waiting(n) for n in range(3)],
        [busy("gpu0"), busy("gpu1")],
        {"gpu0": 5.0, "gpu1": 9.0},
        0.0,
        FairShareAccounting(),
    )
    assert places == {
        "j0": QueuePosition(1, 5.0, "gpu0"),
        "j1": QueuePosition(2, 9.0, "gpu1"),
        "j2": QueuePosition(3, 15.0, "gpu0"),
    }


def test_whoever_has_had_less_is_expected_before_an_older_batch():
    turns = FairShareAccounting()
    jobs = [waiting(n) for n in range(3)] + [waiting(3, "bob")]
    for job in jobs:
        turns.on_submitted(job)
    turns.on_started(jobs[0], 0.0)
    places = forecast(jobs[1:], [busy("gpu0")], {"gpu0": 10.0}, 0.0, turns)
    assert [places[f"j{n}"].position for n in (1, 2, 3)] == [2, 3, 1]


def test_a_long_queue_is_foreseen_job_by_job_at_its_head_and_by_its_work_behind():
    jobs = [waiting(n, f"user{n % 50}") for n in range(1000)]
    places = forecast(jobs, [busy("gpu0")], {"gpu0": 0.0}, 0.0, FairShareAccounting())
    assert len(places) == 1000 and sorted(place.position for place in places.values()) == [*range(1, 1001)]
    last = max(places.values(), key=lambda place: place.position)
    assert last.device is None and last.start_at is not None
    assert abs(last.start_at - 999 * 10) < 0.02 * 9990, HORIZON


def test_without_a_device_nobody_knows_when():
    assert forecast([waiting(0)], [busy("gpu0")], {}, 0.0, FairShareAccounting()) == {"j0": QueuePosition(1)}


def test_reasons_are_for_a_person():
    small, large = DeviceState("gpu0", 10 * GIB, idle=False), DeviceState("gpu1", 16 * GIB, idle=False)
    place = QueuePosition(1, 40.4, "gpu1")
    assert reason(LARGE, place, [small, large], TITLES, 0.0) == "needs 14.0 GiB; GPU 1 has 16.0 GiB in about 40 s"
    assert reason(LARGE, QueuePosition(1), [small], TITLES, 0.0) == "needs 14.0 GiB; no running device has as much"
    idle = DeviceState("gpu1", 16 * GIB)
    assert reason(LARGE, place, [idle], TITLES, 0.0) == "starts as soon as the jobs before it have"
    busy_text = "needs 14.0 GiB; every device that can hold it is busy (GPU 1)"
    assert reason(LARGE, QueuePosition(1), [large], TITLES, 0.0) == busy_text


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1.0, 5.0, 50.0])), min_size=1, max_size=15))
def test_if_nothing_more_comes_and_times_are_right_every_promise_is_kept(asked: list[tuple[str, float]]):
    jobs = [waiting(number, user, expected_s) for number, (user, expected_s) in enumerate(asked)]
    world = Simulation(plan, {"gpu0": busy("gpu0"), "gpu1": busy("gpu1")}, busy_until={"gpu0": 3.0, "gpu1": 7.0})
    for job in jobs:
        world.comes(job)
    promised = forecast(jobs, [*world.devices.values()], world.busy_until, 0.0, world.turns)
    runs = world.live([])
    assert {run.job.job_id: run.starts_at for run in runs} == {name: place.start_at for name, place in promised.items()}


def test_times_are_learned_and_guessed_from_the_nearest_shape():
    timings = DurationEstimates([])
    assert timings.expected_s("wan", "text-to-video", 100, "video") == 180.0
    assert timings.update("wan", "text-to-video", 100, 20.0) == DurationEstimate("wan", "text-to-video", 100, 20.0, 1)
    assert timings.update("wan", "text-to-video", 100, 30.0).run_s == 23.0
    assert timings.expected_s("wan", "text-to-video", 200, "video") == 46.0
    timings.update("wan", "text-to-video", 400, 60.0)
    assert timings.expected_s("wan", "text-to-video", 380, "video") == 57.0
    assert timings.expected_s("wan", "extend", 100, "video") == 180.0, "another workflow is another matter"


def test_a_job_is_given_ten_times_its_length_and_its_weights_time_to_be_read():
    assert progress_timeout_s(4.0, 0) == 340.0
    assert progress_timeout_s(4.0, 10**10) == 540.0
