"""How long jobs take: learned from each run, by model, workflow and shape. The table `timing` keeps it."""

from dataclasses import dataclass

from sqlite_utils import Database

from server.vram import Shape

LEARNING = 0.3
"""The share of the newest run in the average: the last five runs make up most of it."""

UNKNOWN_S = {"image": 10.0, "video": 180.0, "upscale": 5.0, "remove-bg": 3.0}
"""Before the first run, by kind."""

HANG_FLOOR_S, HANG_FACTOR, SLOWEST_DISK_BYTES_PER_S = 300.0, 10.0, 50e6


@dataclass(frozen=True)
class Timing:
    """`work` is pixels x frames x passes: what a run's length grows with. `run_s` is without loading weights."""

    model: str
    workflow: str
    work: int
    run_s: float
    runs: int


class Timings:
    """All of it in memory."""

    def __init__(self, known: list[Timing]) -> None:
        self._known: dict[tuple[str, str], dict[int, Timing]] = {}
        for timing in known:
            self._add(timing)

    def expect(self, model: str, workflow: str, work: int, kind: str) -> float:
        """Seconds of a run: of this shape; else of the nearest one, in proportion; else of a model of the kind."""
        known = self._known.get((model, workflow))
        if not known:
            return UNKNOWN_S.get(kind, UNKNOWN_S["image"])
        nearest = known.get(work) or min(known.values(), key=lambda timing: abs(timing.work - work))
        return nearest.run_s * work / nearest.work

    def learn(self, model: str, workflow: str, work: int, run_s: float) -> Timing:
        """The average, moved towards this run."""
        before = self._known.get((model, workflow), {}).get(work)
        if before:
            run_s = before.run_s + LEARNING * (run_s - before.run_s)
        timing = Timing(model, workflow, work, run_s, before.runs + 1 if before else 1)
        self._add(timing)
        return timing

    def _add(self, timing: Timing) -> None:
        self._known.setdefault((timing.model, timing.workflow), {})[timing.work] = timing


def work_of(shape: Shape) -> int:
    return max(1, shape.pixels * shape.frames * shape.passes)


def hang_s(expected_s: float, missing_bytes: int) -> float:
    """After so long without a sign of progress a job hangs: ten times what the whole of it takes, five minutes at
    least, and the time in which even a slow disk yields the weights."""
    return HANG_FLOOR_S + HANG_FACTOR * expected_s + missing_bytes / SLOWEST_DISK_BYTES_PER_S


def read_timings(db: Database) -> list[Timing]:
    return [Timing(**row) for row in db.query("SELECT * FROM timing")]


def record_timing(db: Database, timing: Timing) -> None:
    db.table("timing").upsert(
        {
            "model": timing.model,
            "workflow": timing.workflow,
            "work": timing.work,
            "run_s": timing.run_s,
            "runs": timing.runs,
        },
        pk=("model", "workflow", "work"),
    )
