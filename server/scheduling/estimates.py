"""Estimates learned from runs: duration by model, workflow and work; peak memory by mode, phase and shape. Pure.

The tables `timing` and `peak` store what was measured (`server/dispatch/records.py`).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.base import ExecutionMode, Peak
from pipelines.catalog.catalog import PhaseWorking, Working
from server.scheduling.need import Shape

HEADROOM, SLACK_BYTES = 1.03, 16 * 2**20
"""What is expected over the largest peak that was measured: allocators are not exact, and small peaks least of all."""

MEASURES = {"cuda": "reserved", "cpu": "resident set"}
"""How a worker measures: what CUDA's allocator took from the device; how much the process grew."""


@dataclass(frozen=True)
class PeakMeasurement:
    """The largest peak of one phase, of all runs of one model and shape in one way. `device_kind` is cuda or cpu.

    With `measured_at` 0 it was not measured but concluded, from a run that did not fit: it tells of this shape alone.
    """

    model: str
    way: ExecutionMode
    phase: str
    pixels: int
    frames: int
    device_kind: str
    working_bytes: int
    allocated_bytes: int
    measured_at: float


class PeakEstimates:
    """All that was measured on this kind of device, in memory."""

    def __init__(self, device_kind: str, measured: Iterable[PeakMeasurement] = ()) -> None:
        self.device_kind = device_kind
        self._by_model: dict[str, dict[tuple[object, ...], PeakMeasurement]] = defaultdict(dict)
        for each in measured:
            self.add(each)

    def add(self, measured: PeakMeasurement) -> None:
        if measured.device_kind == self.device_kind:
            self._by_model[measured.model][key_of(measured)] = measured

    def new_maxima(self, model: str, way: ExecutionMode, shape: Shape, peaks: Iterable[Peak]) -> list[Peak]:
        """Those of a run's peaks that are larger than any before: most runs have none, and write nothing."""
        known = {(each.phase, each.way, each.pixels, each.frames): each for each in self._by_model[model].values()}
        places = [(peak, known.get((peak.phase, way, shape.pixels, shape.frames))) for peak in peaks]
        return [peak for peak, last in places if last is None or peak.working_bytes > last.working_bytes]

    def of(self, model: str) -> list[PeakMeasurement]:
        return list(self._by_model[model].values())

    def estimates_for(
        self, model: str, working: Working, shape: Shape
    ) -> Mapping[str, tuple[tuple[ExecutionMode, int], ...]]:
        """By phase: what to expect in each way that was measured.

        1. Of the very same shape: the largest peak ever measured, and headroom.
        2. Of other shapes alone: the estimate, times the most by which a peak ever passed its estimate. A model that
           was never under-estimated keeps its estimate: nothing is taken off for a shape that nobody has seen.
        """
        found: dict[str, dict[ExecutionMode, int]] = defaultdict(dict)
        for each in self._by_model[model].values():
            if (each.pixels, each.frames) == (shape.pixels, shape.frames):
                found[each.phase][each.way] = with_headroom(each.working_bytes)
        for phase in working.phases:
            for way in {each.way for each in self._of_phase(model, phase.name)} - found[phase.name].keys():
                if expected_bytes := self._scaled(model, phase, way, shape):
                    found[phase.name][way] = expected_bytes
        return {name: tuple(ways.items()) for name, ways in found.items() if ways}

    def _of_phase(self, model: str, phase: str) -> list[PeakMeasurement]:
        """Those that were measured."""
        return [each for each in self._by_model[model].values() if each.phase == phase and each.measured_at]

    def _scaled(self, model: str, phase: PhaseWorking, way: ExecutionMode, shape: Shape) -> int | None:
        """The estimate, raised as rule 2 says; None where it was never too low. A tile's is the same for all shapes."""
        alike = [each for each in self._of_phase(model, phase.name) if each.way == way]
        if way.tiled and phase.tiled_bytes is not None:
            estimates = [phase.tiled_bytes] * len(alike)
            estimate = phase.tiled_bytes
        else:
            estimates = [phase.bytes_for(each.pixels, each.frames) for each in alike]
            estimate = phase.bytes_for(shape.pixels, shape.frames)
        worst = max(each.working_bytes / max(1, guess) for each, guess in zip(alike, estimates, strict=True))
        return with_headroom(estimate * worst) if worst > 1 else None


def with_headroom(peak_bytes: float) -> int:
    return int(peak_bytes * HEADROOM) + SLACK_BYTES


def key_of(measured: PeakMeasurement) -> tuple[object, ...]:
    return measured.way, measured.phase, measured.pixels, measured.frames


LEARNING = 0.3
"""The share of the newest run in the average: the last five runs make up most of it."""

UNKNOWN_S = {"image": 10.0, "video": 180.0, "upscale": 5.0, "remove-bg": 3.0}
"""Before the first run, by kind."""

MIN_PROGRESS_TIMEOUT_S, PROGRESS_TIMEOUT_FACTOR, SLOWEST_DISK_BYTES_PER_S = 300.0, 10.0, 50e6


@dataclass(frozen=True)
class DurationEstimate:
    """`work` is pixels x frames x passes: what a run's length grows with. `run_s` is without loading weights."""

    model: str
    workflow: str
    work: int
    run_s: float
    runs: int


class DurationEstimates:
    """All of it in memory."""

    def __init__(self, known: list[DurationEstimate]) -> None:
        self._known: dict[tuple[str, str], dict[int, DurationEstimate]] = {}
        for timing in known:
            self._add(timing)

    def expected_s(self, model: str, workflow: str, work: int, kind: str) -> float:
        """Seconds of a run: of this shape; else of the nearest one, in proportion; else of a model of the kind."""
        known = self._known.get((model, workflow))
        if not known:
            return UNKNOWN_S.get(kind, UNKNOWN_S["image"])
        nearest = known.get(work) or min(known.values(), key=lambda timing: abs(timing.work - work))
        return nearest.run_s * work / nearest.work

    def update(self, model: str, workflow: str, work: int, run_s: float) -> DurationEstimate:
        """The average, moved towards this run."""
        before = self._known.get((model, workflow), {}).get(work)
        if before:
            run_s = before.run_s + LEARNING * (run_s - before.run_s)
        timing = DurationEstimate(model, workflow, work, run_s, before.runs + 1 if before else 1)
        self._add(timing)
        return timing

    def _add(self, timing: DurationEstimate) -> None:
        self._known.setdefault((timing.model, timing.workflow), {})[timing.work] = timing


def work_units(shape: Shape) -> int:
    return max(1, shape.pixels * shape.frames * shape.passes)


def progress_timeout_s(expected_s: float, missing_bytes: int) -> float:
    """After so long without a sign of progress a job hangs: ten times what the whole of it takes, five minutes at
    least, and the time in which even a slow disk yields the weights."""
    return MIN_PROGRESS_TIMEOUT_S + PROGRESS_TIMEOUT_FACTOR * expected_s + missing_bytes / SLOWEST_DISK_BYTES_PER_S
