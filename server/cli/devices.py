"""`plantain devices` and `plantain models --memory`: what the server last stored about devices and memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlite_utils import Database

from pipelines.base import ExecutionMode
from pipelines.catalog.catalog import WEIGHTS_TOML, Catalog, Model
from pipelines.catalog.reader import load_catalog
from pipelines.weights.installed import Installed
from server.cli.common import Data, open_database, print_table
from server.dispatch.records import FAL, read_devices, read_peaks
from server.dispatch.status import oom_attempts, with_models
from server.model_registry import ModelRegistry
from server.scheduling.estimates import PeakEstimates, PeakMeasurement
from server.scheduling.need import Shape, need_of
from server.settings import Settings
from server.timestamps import iso

GIB = 2**30
COMPONENTS = ["device", "component", "models", "on device", "in host memory", "since", "how"]
MEMORY = ["model", "weights", "phase", "mode", "shape", "estimate", "measured", "expected"]


def register(app: typer.Typer) -> None:
    app.command()(devices)


def devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: Data = Path("data"),
    weights_toml: Annotated[Path, typer.Option("--weights-toml", envvar="PLANTAIN_WEIGHTS_TOML")] = WEIGHTS_TOML,
) -> None:
    """Show each device as last stored: budgets, components, evictions, out-of-memory attempts."""
    users = ModelRegistry(load_catalog(weights_toml), Installed(data / "weights")).users()
    with open_database(data) as db:
        states = [
            {**with_models(state, users), "oomAttempts": oom_attempts(db, state["id"])} for state in read_devices(db)
        ]
    if as_json:
        typer.echo(json.dumps({"devices": states}, indent=1))
        return
    for state in states:
        print_device(state)


def print_device(state: dict[str, Any]) -> None:
    host = f"; host copies {gib(state['hostBytes'])}" if state["hostBudgetBytes"] else ""
    host += f" of {gib(state['hostBudgetBytes'])}" if state["hostBudgetBytes"] else ""
    host += f"; other processes {gib(state['othersBytes'])}" if state.get("othersBytes") else ""
    typer.echo(
        f"{state['id']} ({state['name']}): {gib(state['residentBytes'])} of {gib(state['budgetBytes'])}{host}, "
        f"as of {iso(state['seenAt'])}"
    )
    print_table([component_row(state["id"], each) for each in state["components"]], COMPONENTS)
    if state.get("prefetch"):
        typer.echo(f"  {prefetch_line(state['prefetch'])}")
    for each in state["evictions"][:5]:
        typer.echo(f"  evicted {each['name']}, {gib(each['bytes'])}, at {each['at']}")
    for each in state["oomAttempts"][:5]:
        last = "then fell back to fal" if each["nextDevice"] == FAL else "then failed"
        then = f"then {each['nextMode']} on {each['nextDevice']}" if each["nextMode"] else last
        typer.echo(f"  {each['model']} ran out of memory, {each['mode']}, at {each['at']}; {then}")


def prefetch_line(prefetch: dict[str, Any]) -> str:
    """The prefetch under way, or the last one."""
    parts = ", ".join(f"{each['name']} ({gib(each['bytes'])}, to the {each['to']})" for each in prefetch["components"])
    failure = f"; incomplete: {prefetch['failure']}" if prefetch["failure"] else ""
    return f"{'prefetched' if prefetch['ended'] else 'prefetching'} for {prefetch['jobId']}: {parts}{failure}"


def component_row(device: str, each: dict[str, Any]) -> dict[str, object]:
    how = ["streamed"] if each["streamed"] else []
    how += ["page-locked"] if each["pageLocked"] else []
    return {
        "device": device,
        "component": each["name"],
        "models": ", ".join(each["models"]),
        "on device": gib(each["bytes"]),
        "in host memory": gib(each["hostBytes"]),
        "since": each["since"],
        "how": ", ".join(how),
    }


def memory_rows(catalog: Catalog, installed: Installed, data: Path) -> list[dict[str, object]]:
    """For each installed model and phase: the estimate, the largest measured peak, and the expectation from both."""
    measured: list[PeakMeasurement] = []
    if Settings(data=data).database.exists():
        with open_database(data) as db:
            measured = read_measured(db)
    kinds = {each.device_kind for each in measured} or {"cuda"}
    return [row for model in catalog.models.values() for kind in sorted(kinds)
            for row in model_rows(model, installed, PeakEstimates(kind, measured))]  # fmt: skip


def read_measured(db: Database) -> list[PeakMeasurement]:
    return read_peaks(db) if db.table("peak").exists() else []


def model_rows(model: Model, installed: Installed, peaks: PeakEstimates) -> Iterator[dict[str, object]]:
    weights = installed.weights(model)
    if weights is None:
        return
    known = peaks.of(model.id)
    for shape in dict.fromkeys([*(Shape(each.pixels, each.frames) for each in known), usual_shape(model)]):
        alike = [each for each in known if (each.pixels, each.frames) == (shape.pixels, shape.frames)]
        plain = need_of(weights, model.working, shape)
        learned = need_of(weights, model.working, shape, peaks.estimates_for(model.id, model.working, shape))
        for phase in plain.phases:
            expected = next(each for each in learned.phases if each.name == phase.name)
            for mode in {each.way: 0 for each in alike if each.phase == phase.name} or {ExecutionMode(): 0}:
                found = [each for each in alike if (each.phase, each.way) == (phase.name, mode)]
                weights_bytes = plain.phase_weights(phase, ExecutionMode("staged"))
                figures = weights_bytes, phase.bytes_in(mode), largest(found), expected.bytes_in(mode)
                yield memory_row(model, shape, phase.name, mode, *figures)
        if not plain.phases:
            figures = plain.weights_bytes, plain.working_bytes, largest(alike), learned.working_in(ExecutionMode())
            yield memory_row(model, shape, "run", ExecutionMode(), *figures)


def memory_row(
    model: Model,
    shape: Shape,
    phase: str,
    mode: ExecutionMode,
    weights: int,
    estimate: int,
    measured: int | None,
    expected: int,
) -> dict[str, object]:
    return {
        "model": model.id,
        "weights": gib(weights),
        "phase": phase,
        "mode": mode.name,
        "shape": f"{shape.pixels / 1e6:.2f} MP" + (f" x {shape.frames}" if shape.frames > 1 else ""),
        "estimate": gib(estimate),
        "measured": None if measured is None else gib(measured),
        "expected": gib(expected),
    }


def largest(measured: list[PeakMeasurement]) -> int | None:
    return max((each.working_bytes for each in measured), default=None)


def usual_shape(model: Model) -> Shape:
    """The first of the model's sizes; for video, its longest."""
    width, height = next(iter(model.sizes.values()), (1024, 1024))
    return Shape(width * height, model.frames.max if model.frames else 1)


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
