"""Memory that other programs take of a device: when it counts, what is planned then, and how a job waits for it."""

from types import SimpleNamespace

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.base import ExecutionMode
from server.dispatch.messages import GpuMemoryReport
from server.scheduling.external_memory import LESS_AFTER_S, MORE_AFTER_S, STEP_BYTES, ExternalMemory, external_bytes
from server.scheduling.forecast import QueuePosition, reason
from server.scheduling.need import Need
from server.scheduling.placement import choose_mode, refusal
from server.scheduling.plan import plan
from server.scheduling.types import DeviceState, Start, WaitingJob
from server.workers import devices
from server.workers.devices import DeviceSpec
from server.workers.protocol import Ready, Resident, Run, Succeeded
from tests.dispatch.test_dispatcher import NOW, Bench, told
from tests.scheduling.test_placement import need

GIB = 2**30


def after(others: ExternalMemory, *seen: tuple[float, float]) -> list[int]:
    """What counts after each look: (instant, steps taken)."""
    counted = []
    for at, steps in seen:
        others = others.seen(int(steps * STEP_BYTES), at)
        counted.append(others.taken_bytes // STEP_BYTES)
    return counted


def test_more_counts_once_it_has_lasted_and_a_moments_lag_does_not():
    assert after(ExternalMemory(), (0, 4), (1, 4), (MORE_AFTER_S, 4)) == [0, 0, 4]
    assert after(ExternalMemory(), (0, 9), (1, 0), (2, 9), (3, 0), (4, 0)) == [0] * 5, "the driver's figure lags"
    assert after(ExternalMemory(), (0, 9), (1, 4), (2, 6)) == [0, 0, 4], "as much as was taken all the time"
    assert after(ExternalMemory(), (0, 0.9), (9, 0.9)) == [0, 0], "less than a step is within the reserve"
    assert after(ExternalMemory(), (0, 3.1), (9, 3.1)) == [0, 4]


def test_less_counts_later_and_at_the_edge_of_a_step_nothing_flutters():
    four = ExternalMemory(4 * STEP_BYTES)
    assert after(four, (0, 0), (LESS_AFTER_S - 1, 0), (LESS_AFTER_S, 0)) == [4, 4, 0]
    assert after(four, *((at, 3 + at % 2) for at in range(60))) == [4] * 60
    assert after(four, (0, 1), (14, 2), (15, 1)) == [4, 4, 2]
    assert after(four, (0, 1), (14, 4), (15, 1), (29, 1)) == [4] * 4, "it came back in between"


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60))
def test_what_counts_is_never_more_than_was_seen_and_ends_where_it_stays(steps: list[float]):
    others = ExternalMemory()
    for at, each in enumerate(steps):
        others = others.seen(int(each * STEP_BYTES), at)
        assert others.taken_bytes <= (max(steps[: at + 1]) + 1) * STEP_BYTES
    for at in range(len(steps), len(steps) + 60):
        others = others.seen(int(steps[-1] * STEP_BYTES), at)
    assert abs(others.taken_bytes - steps[-1] * STEP_BYTES) <= 2 * STEP_BYTES


def test_what_is_taken_is_what_the_budget_lacks():
    assert external_bytes(budget_bytes=20, resident_bytes=0, free_bytes=22, margin_bytes=1) == 0
    assert external_bytes(budget_bytes=20, resident_bytes=12, free_bytes=10, margin_bytes=1) == 0
    assert external_bytes(budget_bytes=20, resident_bytes=12, free_bytes=4, margin_bytes=1) == 5


def test_a_plan_goes_by_what_is_left_and_a_job_waits_for_the_rest():
    it = need(pixels=2)
    roomy, taken_of = DeviceState("gpu0", 110), DeviceState("gpu0", 70, external_bytes=40)
    assert (choose_mode(it, roomy), choose_mode(it, taken_of)) == (ExecutionMode("resident"), ExecutionMode("staged"))
    small = DeviceState("gpu0", 20, external_bytes=90)
    assert choose_mode(it, small) is None
    assert refusal(it, [small]) is None, "it could run, were it alone"
    assert plan([WaitingJob("j1", it)], [small]) == []
    assert plan([WaitingJob("j1", it)], [taken_of]) == [Start("j1", "gpu0")]
    assert refusal(it, [DeviceState("gpu0", 20, external_bytes=5)]) is not None


def test_a_waiting_job_says_who_has_the_memory():
    large = Need((("a", 20 * GIB),), GIB)
    busy = DeviceState("gpu0", 12 * GIB, external_bytes=10 * GIB)
    said = reason(large, QueuePosition(1), [busy], {"gpu0": "GPU 0"}, NOW)
    assert said == "needs 21.0 GiB; other programs have 10.0 GiB of GPU 0"


def test_the_driver_is_asked_for_each_gpu_and_one_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def handle(uuid: str) -> str:
        if uuid == "GPU-gone":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return uuid

    monkeypatch.setattr(devices, "_open_driver", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda found: SimpleNamespace(free=7))
    gpus = [DeviceSpec(uuid, "GPU", "cuda", 24, 20) for uuid in ("GPU-gone", "GPU-1")]
    assert devices.free_bytes(gpus) == {"GPU-1": 7}


def says(it: Bench, free_bytes: int) -> None:
    it.dispatcher.inbox.put_nowait(GpuMemoryReport({"gpu0": free_bytes}))


CLOCK = [NOW]


@told(budget_bytes=20 * GIB, clock=lambda: CLOCK[0])
async def test_a_job_waits_until_the_other_program_is_gone(it: Bench):
    it.worker().says(Ready())
    for free in (8, 8):
        says(it, free * GIB)
        await it.settle()
        CLOCK[0] += MORE_AFTER_S
    assert it.dispatcher.state.devices[0].budget_bytes == 8 * GIB
    await it.submit(1, weights=10 * GIB)
    await it.settle()
    assert it.told() == []
    assert it.dispatcher.status.reason("j1") == "needs 10.0 GiB; other programs have 12.0 GiB of the CPU"
    for _ in range(2):
        says(it, 22 * GIB)
        await it.settle()
        CLOCK[0] += LESS_AFTER_S
    assert it.told() == ["j1"]


@told(budget_bytes=20 * GIB, clock=lambda: CLOCK[0])
async def test_what_a_job_takes_while_it_runs_is_not_taken_for_another_programs(it: Bench):
    it.worker().says(Ready())
    await it.submit(1, weights=10 * GIB)
    await it.settle()
    assert isinstance(it.worker().told[0], Run)
    for _ in range(4):
        says(it, 0)
        CLOCK[0] += 5
        await it.settle()
    it.worker().says(Succeeded("j1", 8, 8, 0.5))
    await it.settle()
    for _ in range(4):
        says(it, 0)  # the worker's allocator has not given its memory back yet
        CLOCK[0] += 5
        await it.settle()
    assert it.dispatcher.state.devices[0].external_bytes == 0
    it.worker().says(Resident((("a", 10 * GIB),)))
    for _ in range(4):
        says(it, 12 * GIB)
        CLOCK[0] += 5
        await it.settle()
    assert it.dispatcher.state.devices[0].external_bytes == 0
    state = it.dispatcher.status.device(it.dispatcher.state.workers["gpu0"])
    assert (state["budgetBytes"], state["othersBytes"]) == (20 * GIB, 0)
