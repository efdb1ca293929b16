"""What runs were measured to take beside the weights, and what is to be expected from it. Kept in the database."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from pipelines.base import Peak, Way
from pipelines.catalog import PhaseWorking, Working
from server.vram import Shape

HEADROOM, SLACK_BYTES = 1.03, 16 * 2**20
"""What is expected over the largest peak that was measured: allocators are not exact, and small peaks least of all."""

MEASURES = {"cuda": "reserved", "cpu": "resident set"}
"""How a worker measures: what CUDA's allocator took from the device; how much the process grew."""


@dataclass(frozen=True)
class Measured:
    """The largest peak of one phase, of all runs of one model and shape in one way. `device_kind` is cuda or cpu.

    With `measured_at` 0 it was not measured but concluded, from a run that did not fit: it tells of this shape alone.
    """

    model: str
    way: Way
    phase: str
    pixels: int
    frames: int
    device_kind: str
    working_bytes: int
    allocated_bytes: int
    measured_at: float


class Peaks:
    """All that was measured on this kind of device, in memory."""

    def __init__(self, device_kind: str, measured: Iterable[Measured] = ()) -> None:
        self.device_kind = device_kind
        self._by_model: dict[str, dict[tuple[object, ...], Measured]] = defaultdict(dict)
        for each in measured:
            self.add(each)

    def add(self, measured: Measured) -> None:
        if measured.device_kind == self.device_kind:
            self._by_model[measured.model][key_of(measured)] = measured

    def raised(self, model: str, way: Way, shape: Shape, peaks: Iterable[Peak]) -> list[Peak]:
        """Those of a run's peaks that are larger than any before: most runs have none, and write nothing."""
        known = {(each.phase, each.way, each.pixels, each.frames): each for each in self._by_model[model].values()}
        places = [(peak, known.get((peak.phase, way, shape.pixels, shape.frames))) for peak in peaks]
        return [peak for peak, last in places if last is None or peak.working_bytes > last.working_bytes]

    def of(self, model: str) -> list[Measured]:
        return list(self._by_model[model].values())

    def learned(self, model: str, working: Working, shape: Shape) -> Mapping[str, tuple[tuple[Way, int], ...]]:
        """By phase: what to expect in each way that was measured.

        1. Of the very same shape: the largest peak ever measured, and headroom.
        2. Of other shapes alone: the estimate, times the most by which a peak ever passed its estimate. A model that
           was never under-estimated keeps its estimate: nothing is taken off for a shape that nobody has seen.
        """
        found: dict[str, dict[Way, int]] = defaultdict(dict)
        for each in self._by_model[model].values():
            if (each.pixels, each.frames) == (shape.pixels, shape.frames):
                found[each.phase][each.way] = with_headroom(each.working_bytes)
        for phase in working.phases:
            for way in {each.way for each in self._of_phase(model, phase.name)} - found[phase.name].keys():
                if expected_bytes := self._scaled(model, phase, way, shape):
                    found[phase.name][way] = expected_bytes
        return {name: tuple(ways.items()) for name, ways in found.items() if ways}

    def _of_phase(self, model: str, phase: str) -> list[Measured]:
        """Those that were measured."""
        return [each for each in self._by_model[model].values() if each.phase == phase and each.measured_at]

    def _scaled(self, model: str, phase: PhaseWorking, way: Way, shape: Shape) -> int | None:
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


def key_of(measured: Measured) -> tuple[object, ...]:
    return measured.way, measured.phase, measured.pixels, measured.frames


def record_peaks(
    db: Database, model: str, way: Way, shape: Shape, device_kind: str, peaks: Iterable[Peak], now: float
) -> list[Measured]:
    """Of each phase the largest peak stays. Returns the rows as they are then."""
    rows = []
    for peak in peaks:
        rows += db.query(
            RECORD,
            {
                "model": model,
                "tier": way.tier,
                "tiled": int(way.tiled),
                "phase": peak.phase,
                "pixels": shape.pixels,
                "frames": shape.frames,
                "device_kind": device_kind,
                "working_bytes": peak.working_bytes,
                "allocated_bytes": peak.allocated_bytes,
                "now": now,
            },
        )
    return [measured_of(row) for row in rows]


def read_peaks(db: Database) -> list[Measured]:
    return [measured_of(row) for row in db.query("SELECT * FROM peak ORDER BY model, phase, pixels, frames")]


def measured_of(row: Mapping[str, Any]) -> Measured:
    fields = {name: row[name] for name in Measured.__dataclass_fields__ if name != "way"}
    return Measured(way=Way(row["tier"], bool(row["tiled"])), **fields)


RECORD = """
INSERT INTO peak (model, tier, tiled, phase, pixels, frames, device_kind, working_bytes, allocated_bytes, measured_at)
VALUES (:model, :tier, :tiled, :phase, :pixels, :frames, :device_kind, :working_bytes, :allocated_bytes, :now)
ON CONFLICT (model, tier, tiled, phase, pixels, frames, device_kind) DO UPDATE SET
    working_bytes = max(working_bytes, excluded.working_bytes),
    allocated_bytes = max(allocated_bytes, excluded.allocated_bytes),
    measured_at = excluded.measured_at
RETURNING *
"""
