"""A job that runs out of memory, as the dispatcher takes it from try to try: events in, commands and rows out."""

from dataclasses import replace

from pipelines.base import Peak
from server.dispatch.records import read_attempts
from server.jobs import job
from server.model_registry import RunSpec
from server.scheduling.need import Need, Phase
from server.workers.protocol import Failed, Ready, Resident, Run, Succeeded
from tests.dispatch import test_dispatcher
from tests.dispatch.test_dispatcher import Bench, told

OUT = Failed("j1", "OUT_OF_MEMORY", "The device ran out of memory.")


def phased(model: str) -> RunSpec:
    """10 bytes of weights in two phases, tiles for the second."""
    made = test_dispatcher.runnable(model)
    phases = (Phase("denoise", (model,), 3), Phase("decode", ("vae",), 5, tiled_bytes=2))
    return replace(made, need=Need(((model, 8), ("vae", 2)), 5, phases))


async def submit(it: Bench) -> None:
    output = it.dispatcher.effects.files.new_name(".png")
    new = job.NewJob("j1", it.user, None, "image", "a", "text-to-image", {}, 1, output, 1)
    await it.dispatcher.submit(new, phased("a"))
    await it.settle()


async def run_out(it: Bench, times: int) -> None:
    """The job starts, and runs out of memory so often."""
    it.worker("gpu0").says(Ready())
    await submit(it)
    for _ in range(times):
        it.worker("gpu0").says(OUT)
        await it.settle()
        await it.settle()


def ways(it: Bench, device: str = "gpu0") -> list[str]:
    return [command.way.name for command in it.worker(device).told if isinstance(command, Run)]


@told(devices=2)
async def test_it_goes_down_on_one_device_and_then_to_the_other_and_no_try_is_an_attempt(it: Bench):
    it.worker("gpu0").says(Ready())
    await submit(it)
    it.worker("gpu1").says(Ready())
    for _ in range(5):
        it.worker("gpu0").says(OUT, Resident(()))
        await it.settle()
    while not ways(it, "gpu1"):  # the last try took several writes
        await it.settle()
    assert ways(it) == ["resident", "resident", "resident, tiled", "staged", "staged, tiled"]
    assert ways(it, "gpu1") == ["resident"]
    it.worker("gpu1").says(Succeeded("j1", 8, 8, 0.1))
    await it.settle()
    assert (it.job(1).status, it.job(1).attempts) == ("succeeded", 1)
    rows = [(row["device"], row["way"], row["next_device"], row["next_way"]) for row in read_attempts(it.store.db)]
    assert rows[0] == ("gpu0", "staged, tiled", "gpu1", "resident")
    assert len(rows) == 5


@told()
async def test_jobs_like_it_begin_where_a_job_ended_well(it: Bench):
    await run_out(it, 2)
    peaks = it.dispatcher.state.memory.peaks
    assert peaks.of("a") == []
    it.worker("gpu0").says(Succeeded("j1", 8, 8, 0.1, peaks=(Peak("decode", 2, 2, 10),)))
    await it.settle()
    assert {each.way.name: each.working_bytes for each in peaks.of("a")} == {
        "resident, tiled": 2,
        "resident": 25 - 10 + 1,
    }


@told()
async def test_when_nothing_is_left_the_job_fails_with_what_was_tried(it: Bench):
    await run_out(it, 5)
    error = it.job(1).error
    assert error and error["code"] == "OUT_OF_MEMORY"
    assert error["error"].endswith(
        "Tried: resident on gpu0; resident, tiled on gpu0; staged on gpu0; staged, tiled on gpu0."
    )


@told()
async def test_a_job_that_was_cancelled_while_it_ran_out_is_not_tried_again(it: Bench):
    it.worker("gpu0").says(Ready())
    await submit(it)
    await it.dispatcher.cancel("j1")
    it.worker("gpu0").says(OUT)
    await it.settle()
    assert it.job(1).status == "cancelled"
    assert ways(it) == ["resident"]
    assert read_attempts(it.store.db) == []
