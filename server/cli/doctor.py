"""`plantain doctor`: checks devices, disk, database, weights and the connection to fal.ai. Changes nothing."""

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from sqlite_utils import Database

from pipelines.base import UnusableWeights
from pipelines.catalog.catalog import WEIGHTS_TOML, Catalog, Model
from pipelines.catalog.reader import load_catalog
from pipelines.weights.installed import Installed, Status
from server.db.backup import missing
from server.db.database import DatabaseUnusable, explain_database_error, refuse_newer
from server.remote.runner import unavailable_reason
from server.settings import Settings, from_environment
from server.workers.devices import DeviceSpec, inventory

GIB = 2**30

CHECK_TIMEOUT_S = 2.0
CLOCK_SLACK_S = 60.0
LOW_DISK_BYTES = 20 * GIB
MARKS = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad [/red]"}

FindingState = Literal["ok", "note", "bad"]
DatabaseFinding = tuple[FindingState, str]


@dataclass(frozen=True)
class Finding:
    """`bad` is a problem that prevents the server from running jobs."""

    state: FindingState
    subject: str
    text: str


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    data: Annotated[Path | None, typer.Option(help="Folder for database, files and weights. [data]")] = None,
    weights_toml: Annotated[Path, typer.Option(help="The catalogue of models.")] = WEIGHTS_TOML,
) -> None:
    """Check devices, disk, database, weights, licences and fal.ai. Changes nothing and sends nothing."""
    from rich.console import Console

    settings = Settings(**{**from_environment(), **({"data": data} if data else {})})  # type: ignore[arg-type]
    catalog = load_catalog(weights_toml)
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
        yield Finding("note", "device", "no CUDA device: jobs run on the CPU, slowly")
    yield _disk(settings.data)
    yield from (Finding(state, "database", text) for state, text in database(settings))
    yield from dict.fromkeys(_weights(catalog, Installed(settings.weights, settings.demo)))  # models share demo weights
    yield from _compiler(catalog)
    yield from _remote(settings, catalog, datetime.now(UTC).date().isoformat())


def _device(device: DeviceSpec) -> str:
    return f"{device.name} ({device.id}): {device.budget_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB to use"


def _disk(data: Path) -> Finding:
    """Free space in the data folder, or in the nearest parent that exists."""
    folder = next(path for path in (data.absolute(), *data.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return Finding("bad", "disk", f"{folder} cannot be written")
    free_bytes = shutil.disk_usage(folder).free
    state: Literal["ok", "note"] = "ok" if free_bytes >= LOW_DISK_BYTES else "note"
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
    """torch.compile needs g++ on a CPU; on CUDA, Triton needs any C compiler."""
    wanting = [model.id for model in catalog.models.values() if model.compiled]
    if wanting and not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        what = "and there is no C compiler: its jobs will fail. On Debian and Ubuntu: apt install g++ python3-dev"
        yield from (Finding("note", "compiler", f"{name} is compiled, {what}") for name in wanting)


def _terms(model: Model) -> str:
    terms = ["not for commercial use"] if model.non_commercial else []
    terms += ["its page asks for a login, set HF_TOKEN"] if model.gated else []
    return f" ({'; '.join(terms)})" if terms else ""


def _remote(settings: Settings, catalog: Catalog, today: str) -> Iterator[Finding]:
    """Never shows the key."""
    trouble = unavailable_reason(settings)
    yield Finding("note", "fal.ai", f"out of reach: {trouble}") if trouble else Finding("ok", "fal.ai", "a key is set")
    for model in catalog.models.values():
        if model.remote and model.retired:
            successor = f"; its successor is {model.retired.successor}" if model.retired.successor else ""
            verb = "ended" if model.retired.date <= today else "ends"
            text = (
                f"{model.name} {verb} on {model.retired.date}{successor}: {', '.join(_own_endpoints(catalog, model))}"
            )
            yield Finding("note", "retired", text)


def _own_endpoints(catalog: Catalog, model: Model) -> list[str]:
    """The model's own endpoints, without those that serve any model."""
    return sorted({name for name in model.remote.values() if not catalog.endpoint(name).serves_any_model})


def database(settings: Settings, now: float | None = None) -> Iterator[DatabaseFinding]:
    """Checks the database and the files that belong with it."""
    if not settings.database.exists():
        yield "note", f"none yet in {settings.data}: the first start creates it"
        return
    try:
        with closing(sqlite3.connect(settings.database, timeout=CHECK_TIMEOUT_S)) as connection:
            yield from _integrity(Database(connection), settings.database)
            yield from _writable(connection)
            yield from _clock(connection, time.time() if now is None else now)
            yield from _files(connection, settings.files)
    except (sqlite3.DatabaseError, DatabaseUnusable) as error:
        yield "bad", str(error) if isinstance(error, DatabaseUnusable) else explain_database_error(error)


def _integrity(db: Database, path: Path) -> Iterator[DatabaseFinding]:
    refuse_newer(db, path)
    problems = [row[0] for row in db.execute("PRAGMA integrity_check(5)").fetchall()]
    if problems != ["ok"]:
        yield "bad", f"damaged: {'; '.join(problems)}. Restore a backup: plantain restore FILE"
    waiting, running = db.execute(
        "SELECT sum(status = 'queued'), sum(status = 'running') FROM job WHERE status IN ('queued', 'running')"
    ).fetchone()
    yield "ok", f"{path.name} is intact; {waiting or 0} jobs queued, {running or 0} running"


def _writable(connection: sqlite3.Connection) -> Iterator[DatabaseFinding]:
    """Takes and releases the write lock."""
    connection.execute("BEGIN IMMEDIATE")
    connection.rollback()
    yield "ok", "writable"


def _clock(connection: sqlite3.Connection, now: float) -> Iterator[DatabaseFinding]:
    (newest_at,) = connection.execute("SELECT max(max(created_at), max(coalesce(finished_at, 0))) FROM job").fetchone()
    if newest_at and newest_at > now + CLOCK_SLACK_S:
        yield "note", f"the clock was set back: the newest job is {newest_at - now:.0f} s in the future"


def _files(connection: sqlite3.Connection, files: Path) -> Iterator[DatabaseFinding]:
    names = [row[0] for row in connection.execute("SELECT name FROM file").fetchall()]
    if gone := missing(names, files):
        yield "note", f"{len(gone)} of {len(names)} files are missing in {files}, such as {gone[0]}"
