"""`plantain doctor`: what this machine has, what is missing, and what to do about it."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.base import UnusableWeights
from pipelines.catalog import WEIGHTS_TOML, Catalog, Model
from pipelines.installed import Installed, Status
from server import checkup
from server.devices import DeviceSpec, inventory
from server.remote.parts import why_not
from server.settings import Settings, from_environment

GIB = 2**30
LITTLE_DISK_BYTES = 20 * GIB
MARKS = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad [/red]"}


@dataclass(frozen=True)
class Finding:
    """`bad` is what keeps the server from serving anything."""

    state: Literal["ok", "note", "bad"]
    subject: str
    text: str


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    data: Annotated[Path | None, typer.Option(help="Folder for database, files and weights. [data]")] = None,
    weights_toml: Annotated[Path, typer.Option(help="The catalogue of models.")] = WEIGHTS_TOML,
) -> None:
    """Look at devices, disk, weights, licences, and the way to fal.ai. Changes nothing and sends nothing."""
    from rich.console import Console

    settings = Settings(**{**from_environment(), **({"data": data} if data else {})})  # type: ignore[arg-type]
    catalog = Catalog.load(weights_toml)
    findings = [*examine(settings, catalog, inventory(settings.budget_bytes))]
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(f"{MARKS[finding.state]} [bold]{finding.subject}[/bold]", end=" ")
        console.print(finding.text, markup=False)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def examine(settings: Settings, catalog: Catalog, devices: list[DeviceSpec]) -> Iterator[Finding]:
    yield from (Finding("ok", "device", _device(device)) for device in devices)
    if all(device.torch_device == "cpu" for device in devices):
        yield Finding("note", "device", "no CUDA device: everything runs on the CPU, slowly")
    yield _disk(settings.data)
    yield from (Finding(state, "database", text) for state, text in checkup.database(settings))
    yield from dict.fromkeys(_weights(catalog, Installed(settings.weights, settings.demo)))  # models share demo weights
    yield from _compiler(catalog)
    yield from _remote(settings, catalog, datetime.now(UTC).date().isoformat())


def _device(device: DeviceSpec) -> str:
    return f"{device.name} ({device.id}): {device.budget_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB to use"


def _disk(data: Path) -> Finding:
    """Of the folder, or of the nearest one above it that exists."""
    folder = next(path for path in (data.absolute(), *data.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return Finding("bad", "disk", f"{folder} cannot be written")
    free_bytes = shutil.disk_usage(folder).free
    state: Literal["ok", "note"] = "ok" if free_bytes >= LITTLE_DISK_BYTES else "note"
    return Finding(state, "disk", f"{free_bytes / GIB:.0f} GiB free in {folder}")


def _weights(catalog: Catalog, here: Installed) -> Iterator[Finding]:
    for model in catalog.models.values():
        if model.weights is not None:
            try:
                yield _weights_of(model, here.status(model))
            except UnusableWeights as error:
                yield Finding("bad", "weights", str(error))


def _weights_of(model: Model, status: Status) -> Finding:
    if status == "installed":
        return Finding("ok", "weights", f"{model.id} is installed; {model.licence}{_terms(model)}")
    what = "runs on demo weights; the real ones" if status == "demo" else "is missing"
    return Finding("note", "weights", f"{model.id} {what}: plantain pull {model.id}{_terms(model)}")


def _compiler(catalog: Catalog) -> Iterator[Finding]:
    """torch.compile takes g++ on a CPU; on CUDA, Triton takes a C compiler of any name."""
    wanting = [model.id for model in catalog.models.values() if model.compiled]
    if wanting and not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        what = "and here is no C compiler: its jobs will fail. On Debian and Ubuntu: apt install g++ python3-dev"
        yield from (Finding("note", "compiler", f"{name} is compiled, {what}") for name in wanting)


def _terms(model: Model) -> str:
    terms = ["not for commercial use"] if model.non_commercial else []
    terms += ["its page asks for a login, set HF_TOKEN"] if model.gated else []
    return f" ({'; '.join(terms)})" if terms else ""


def _remote(settings: Settings, catalog: Catalog, today: str) -> Iterator[Finding]:
    """The key is never shown."""
    trouble = why_not(settings)
    yield Finding("note", "fal.ai", f"out of reach: {trouble}") if trouble else Finding("ok", "fal.ai", "a key is set")
    for model in catalog.models.values():
        if model.remote and model.retired:
            successor = f"; its successor is {model.retired.successor}" if model.retired.successor else ""
            verb = "ended" if model.retired.date <= today else "ends"
            text = f"{model.name} {verb} on {model.retired.date}{successor}: {', '.join(_own(catalog, model))}"
            yield Finding("note", "retired", text)


def _own(catalog: Catalog, model: Model) -> list[str]:
    """Its endpoints, and not those of services for any model."""
    return sorted({name for name in model.remote.values() if not catalog.endpoint(name).serves_any_model})
