"""What a job needs, by phase, shape and way; which way is chosen; what is tried after running out; what peaks teach."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.base import Component, ExecutionMode, Peak, Weights
from pipelines.catalog.catalog import PhaseWorking, Working
from server.db.database import Database
from server.dispatch.records import read_peaks, record_peaks
from server.jobs.store import JobStore
from server.scheduling.estimates import PeakEstimates, PeakMeasurement, with_headroom
from server.scheduling.need import Need, Shape, need_of, shape_of
from server.scheduling.placement import (
    Attempt,
    best_device,
    choose_mode,
    evictions,
    fits,
    mode_for_worker,
    next_attempt,
    refusal,
    restricted_to,
)
from server.scheduling.types import DeviceState, Evict

RESIDENT, STAGED, STREAMED = ExecutionMode("resident"), ExecutionMode("staged"), ExecutionMode("streamed")
TILED = ExecutionMode("resident", tiled=True)

WORKING = Working(
    phases=(
        PhaseWorking("encode", ("text_encoder", "text_encoder_2"), fixed_bytes=2),
        PhaseWorking("denoise", ("transformer",), fixed_bytes=1, bytes_per_pixel=1),
        PhaseWorking("decode", ("vae",), bytes_per_pixel=3, tiled_bytes=4),
    )
)


def weights(model: str = "flux", transformer: int = 60, blocks: tuple[int, ...] = (10,) * 5) -> Weights:
    return Weights(
        model,
        "flux",
        Path("x"),
        (
            Component("transformer", f"{model}-transformer", transformer, Path("x"), block_bytes=blocks),
            Component("text_encoder", "clip", 5, Path("x")),
            Component("text_encoder_2", "t5", 30, Path("x")),
            Component("vae", "vae", 5, Path("x")),
        ),
    )


def need(pixels: int = 2, model: str = "flux", passes: int = 4) -> Need:
    return need_of(weights(model), WORKING, Shape(pixels, passes=passes))


def device(budget: int, *resident: tuple[str, int], name: str = "gpu0", **more: object) -> DeviceState:
    return DeviceState(name, budget, resident, **more)  # type: ignore[arg-type]


def test_the_need_of_each_way_is_that_of_its_largest_phase():
    it = need(pixels=2)
    assert it.bytes_in(RESIDENT) == 100 + 6, "all weights, and the decode's working bytes, the most of the three"
    assert it.bytes_in(TILED) == 100 + 4
    assert it.bytes_in(STAGED) == 60 + 3, "the denoise's"
    assert it.bytes_in(STREAMED) == max(35 + 2, 10 + 2 * 10 + 3, 5 + 6)
    assert it.total_bytes == 37


def test_the_way_is_the_one_that_finishes_soonest_of_those_that_fit():
    ways = [choose_mode(need(pixels=2), device(budget)) for budget in (106, 105, 63, 62, 37, 36)]
    assert ways == [RESIDENT, STAGED, STAGED, STREAMED, STREAMED, None]


def test_decoding_in_tiles_is_for_where_nothing_else_fits():
    it = need(pixels=30)  # decode 90, denoise 31
    assert choose_mode(it, device(190)) == RESIDENT
    assert choose_mode(it, device(189)) == STAGED
    assert choose_mode(it, device(94)) == ExecutionMode("staged", tiled=True)
    assert choose_mode(it, device(90)) == ExecutionMode("streamed", tiled=True)


def test_a_streamed_run_keeps_as_many_blocks_as_fit():
    it = need(pixels=2)
    assert mode_for_worker(it, device(62)).streamed_bytes == (("flux-transformer", 62 - 3 - 30),)
    assert mode_for_worker(it, device(37)).streamed_bytes == (("flux-transformer", 37 - 3 - 30),)
    assert mode_for_worker(it, device(200)).streamed_bytes == ()
    assert [name for name, _ in mode_for_worker(it, device(200)).phases] == ["encode", "denoise", "decode"]


def test_of_two_idle_devices_the_one_where_it_finishes_sooner_is_taken():
    it = need()
    warm_and_small = device(70, ("clip", 5), ("t5", 30), name="small")
    cold_and_large = device(200, name="large")
    assert best_device(it, [warm_and_small, cold_and_large]).id == "small", "65 to load against 100"
    warm_and_large = device(200, ("flux-transformer", 60), ("clip", 5), name="warm")
    assert best_device(it, [warm_and_small, warm_and_large]).id == "warm"
    streams = device(50, name="streams", link_bytes_per_s=1e9)
    assert best_device(need(passes=100), [streams, device(70, name="slow", link_bytes_per_s=1e8)]).id == "slow"


def test_dev_to_schnell_moves_the_transformer_alone():
    box = device(110, ("flux-transformer", 60), ("clip", 5), ("t5", 30), ("vae", 5))
    schnell = need(model="schnell")
    assert box.missing_bytes(schnell) == 60
    assert evictions(schnell, box) == [Evict("gpu0", "flux-transformer")]


def test_a_staged_run_evicts_others_but_nothing_that_is_its_own():
    box = device(70, ("other", 40), ("clip", 5))
    assert evictions(need(), box) == [Evict("gpu0", "other")]
    assert evictions(need(), device(70, ("small", 5), ("clip", 5))) == []


def test_a_component_larger_than_every_device_streams_and_one_that_cannot_is_refused_with_the_numbers():
    gib = 2**30
    large = need_of(weights(transformer=60 * gib, blocks=(gib,) * 59), WORKING, Shape(2))
    assert choose_mode(large, device(24 * gib)) == STREAMED
    rigid = need_of(weights(transformer=60 * gib, blocks=()), WORKING, Shape(2))
    assert refusal(rigid, [device(24 * gib)]) == "needs 60.0 GiB; the largest device here has 24.0 GiB"


def test_a_component_that_host_memory_cannot_hold_is_refused_with_the_numbers():
    gib = 2**30
    large = need_of(weights(transformer=20 * gib, blocks=()), WORKING, Shape(2))
    told = refusal(large, [device(24 * gib, host_budget_bytes=16 * gib)])
    assert told == "has a component of 20.0 GiB; host memory for the copies of weights is 16.0 GiB"
    assert refusal(large, [device(24 * gib, host_budget_bytes=21 * gib)]) is None


def test_a_family_without_phases_has_one_way():
    flat = need_of(weights(), Working(fixed_bytes=5, bytes_per_pixel=1), 10)
    assert flat.possible == (RESIDENT,)
    assert flat.total_bytes == 115


SIZES = st.integers(1, 60)


@given(st.lists(SIZES, max_size=8), SIZES, SIZES, st.integers(1, 40), st.integers(1, 300))
def test_whatever_the_sizes_the_chosen_way_fits(
    blocks: list[int], outside: int, encoder: int, pixels: int, budget: int
):
    made = Weights(
        "m",
        "f",
        Path("x"),
        (
            Component("transformer", "t", outside + sum(blocks), Path("x"), block_bytes=tuple(blocks)),
            Component("text_encoder", "e", encoder, Path("x")),
        ),
    )
    it = need_of(made, WORKING, Shape(pixels))
    box = device(budget)
    way = choose_mode(it, box)
    assert (way is None) == all(it.bytes_in(each) > budget for each in it.possible) == (refusal(it, [box]) is not None)
    if way:
        assert it.bytes_in(way) <= budget
        for key, kept_bytes in it.kept(budget, way):
            assert 0 <= kept_bytes <= sum(blocks)
            assert it.min_streamed_bytes(key) + kept_bytes + it.phases[1].bytes_in(way) <= budget


# After running out


def climb(devices: list[DeviceState], of: Need) -> list[tuple[str, str]]:
    tried = [Attempt(devices[0].id, choose_mode(of, devices[0]) or RESIDENT)]
    while following := next_attempt(tried, of, devices):
        tried.append(following)
        assert fits(restricted_to(of, following), next(box for box in devices if box.id == following.device))
    return [(rung.device, rung.way.name) for rung in tried]


def test_the_ladder_goes_down_on_one_device_and_then_to_the_next():
    down = ["resident", "resident", "resident, tiled", "staged", "staged, tiled", "streamed", "streamed, tiled"]
    boxes = [device(200, name="a"), device(80, name="b")]
    second = ["staged", "staged", "staged, tiled", "streamed", "streamed, tiled"]
    assert climb(boxes, need()) == [*(("a", way) for way in down), *(("b", way) for way in second)]


def test_a_model_of_one_way_tries_once_more_and_then_elsewhere():
    flat = need_of(weights(), Working(fixed_bytes=5), 1)
    boxes = [device(200, name="a"), device(50, name="too small"), device(150, name="b")]
    assert climb(boxes, flat) == [("a", "resident")] * 2 + [("b", "resident")] * 2


def test_a_job_on_a_rung_runs_there_and_nowhere_else():
    bound_need = restricted_to(need(), Attempt("a", STREAMED))
    assert choose_mode(bound_need, device(200, name="a")) == STREAMED
    assert choose_mode(bound_need, device(200, name="b")) is None


# What peaks teach


def measured(
    phase: str, working: int, pixels: int = 2, way: ExecutionMode = RESIDENT, kind: str = "cuda"
) -> PeakMeasurement:
    return PeakMeasurement("flux", way, phase, pixels, 1, kind, working, working, 1.0)


def expected(peaks: PeakEstimates, pixels: int, way: ExecutionMode = RESIDENT) -> int:
    shape = Shape(pixels)
    return need_of(weights(), WORKING, shape, peaks.estimates_for("flux", WORKING, shape)).bytes_in(way) - 100


def test_a_shape_that_was_measured_is_expected_to_take_its_peak_and_headroom():
    big = [measured("decode", 2000, pixels=1000), measured("denoise", 900, pixels=1000)]
    assert expected(PeakEstimates("cuda"), 1000) == 3000
    assert expected(PeakEstimates("cuda", big), 1000) == with_headroom(2000)


def test_another_shape_is_raised_as_much_as_any_peak_passed_its_estimate_and_never_lowered():
    over, under = measured("decode", 6000, pixels=1000), measured("decode", 1500, pixels=1000)
    assert expected(PeakEstimates("cuda", [over]), 2000) == with_headroom(2 * 6000)
    assert expected(PeakEstimates("cuda", [under]), 2000) == 6000
    concluded = replace(over, measured_at=0.0)
    assert expected(PeakEstimates("cuda", [concluded]), 1000) == with_headroom(6000)
    assert expected(PeakEstimates("cuda", [concluded]), 2000) == 6000, "it tells of its own shape alone"


def test_peaks_of_another_way_or_kind_of_device_teach_nothing():
    others = [measured("decode", 9000, way=STAGED, pixels=1000), measured("decode", 9000, kind="cpu", pixels=1000)]
    assert expected(PeakEstimates("cuda", others), 1000) == 3000


def test_of_each_phase_the_largest_peak_stays_in_the_database(tmp_path: Path):
    store = JobStore(Database(tmp_path / "x.sqlite"))
    for working in (5, 9, 7):
        with store.database.atomic() as db:
            record_peaks(db, "flux", RESIDENT, Shape(2), "cuda", [Peak("decode", working, working - 1, 50)], 1.0)
    assert read_peaks(store.db) == [PeakMeasurement("flux", RESIDENT, "decode", 2, 1, "cuda", 9, 8, 1.0)]
    store.database.close()


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({"numInferenceSteps": 4}, Shape(9, 1, 4)),
        ({"numInferenceSteps": 4, "guidanceScale": 3.5}, Shape(9, 1, 4)),
        ({"numInferenceSteps": 4, "guidanceScale": 5.0, "numFrames": 81}, Shape(9, 81, 8)),
        ({"scale": 4}, Shape(9)),
    ],
)
def test_the_shape_of_a_job_is_read_from_its_params(params: dict[str, object], shape: Shape):
    assert shape_of(params, 9) == shape
