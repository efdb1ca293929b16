"""`plantain pull`, `verify`, `import` and `models`: model weights on this machine."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID
from pipelines.catalog.catalog import WEIGHTS_TOML, Catalog, Model, UnknownModel
from pipelines.catalog.reader import load_catalog
from pipelines.catalog.table import CatalogError
from pipelines.weights.errors import PullError
from pipelines.weights.importer import import_folder
from pipelines.weights.install import OnProgress, Progress
from pipelines.weights.installed import Installed
from pipelines.weights.pull import installed, pull
from pipelines.weights.verify import verify, verify_demo

DataFolder = Annotated[Path, typer.Option("--data", envvar="PLANTAIN_DATA", help="The server's data folder.")]
Offline = Annotated[bool, typer.Option("--offline", envvar="PLANTAIN_OFFLINE", help="Never use the network.")]
AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="Accept a non-commercial licence; recorded in weights.lock.")
]
WeightsToml = Annotated[
    Path, typer.Option("--weights-toml", envvar="PLANTAIN_WEIGHTS_TOML", help="The catalogue of models.")
]
Demo = Annotated[bool, typer.Option("--demo/--no-demo", envvar="PLANTAIN_DEMO", help="Take demo weights into account.")]
DEFAULT_DATA = Path("data")

COLUMNS = {"id": "model", "kind": "kind", "runsOn": "runs on", "weights": "weights", "licence": "licence"}


def register(app: typer.Typer) -> None:
    app.command("pull")(pull_models)
    app.command("verify")(verify_models)
    app.command("import")(import_)
    app.command()(models)


def pull_models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Ids, aliases, or MODEL+LORA.")
    ] = None,
    starter: Annotated[bool, typer.Option("--starter", help="Also the small models that every server needs.")] = False,
    accept_licence: AcceptLicence = False,
    offline: Offline = False,
    data: DataFolder = DEFAULT_DATA,
    weights_toml: WeightsToml = WEIGHTS_TOML,
) -> None:
    """Download, verify and install the weights of models."""
    with report_errors():
        catalog = load_catalog(weights_toml)
        asked = [catalog.find_weights(name) for name in [*(names or []), *(catalog.starter if starter else ())]]
        wanted = [each for model in asked for each in (model.base, model) if each]
        if not wanted:
            raise typer.BadParameter("Name a model, or use --starter. For the list: plantain models")
        missing = [model for model in wanted if not installed(model, data / "weights")]
        if missing:
            pull_each(missing, data / "weights", offline, accept_licence)
        for model in wanted:
            if model not in missing and not starter:
                typer.echo(f"{model.id} is installed already.")


def pull_each(models: list[Model], root: Path, offline: bool, accept_licence: bool) -> None:
    with TemporaryDirectory(prefix="plantain-") as wheels, progress_bars() as on_progress:
        for model in models:
            pull(
                model,
                root,
                offline=offline,
                accept_licence=accept_licence,
                on_progress=on_progress,
                wheels=Path(wheels),
            )


def verify_models(data: DataFolder = DEFAULT_DATA, weights_toml: WeightsToml = WEIGHTS_TOML) -> None:
    """Verify the checksums of all installed and demo weights."""

    def show(model: str, file: Path) -> None:
        typer.echo(f"{model}: {file.name}", err=True)

    with report_errors():
        problems = verify(data / "weights", show)
        demo_problems = verify_demo(load_catalog(weights_toml), show)
    for problem in problems:
        typer.echo(f"{problem.model}: {problem.file}: {problem.what} is wrong. Pull {problem.model} again.")
    for problem in demo_problems:
        typer.echo(f"{problem.model}: {problem.file}: {problem.what} is wrong. It is part of the program: restore it.")
    if problems or demo_problems:
        raise typer.Exit(1)
    typer.echo("All weights are intact.")


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Another weights folder; or a model's folder or file.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The model that DIR holds, or the only one to import.")
    ] = None,
    accept_licence: AcceptLicence = False,
    data: DataFolder = DEFAULT_DATA,
    weights_toml: WeightsToml = WEIGHTS_TOML,
) -> None:
    """Install weights from a folder, without network."""
    with report_errors(), progress_bars() as on_progress:
        catalog = load_catalog(weights_toml)
        names = import_folder(
            folder,
            data / "weights",
            catalog,
            model=catalog.find_weights(model) if model else None,
            accept_licence=accept_licence,
            on_progress=on_progress,
        )
    typer.echo(f"Imported {', '.join(names)}.")


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show the memory of runs: estimated, measured, expected.")
    ] = False,
    demo: Demo = True,
    data: DataFolder = DEFAULT_DATA,
    weights_toml: WeightsToml = WEIGHTS_TOML,
) -> None:
    """List the models: where they run, and whether their weights are installed."""
    with report_errors():
        catalog, here = load_catalog(weights_toml), Installed(data / "weights", demo)
        if memory:
            show_memory(catalog, here, data, as_json)
            return
        rows = [describe(model, here) for model in catalog.models.values()]
    if as_json:
        typer.echo(json.dumps({"models": rows}, indent=1))
    else:
        print_table(rows)


def show_memory(catalog: Catalog, here: Installed, data: Path, as_json: bool) -> None:
    from server.cli.common import print_table  # loads the database, which other commands here do without
    from server.cli.devices import MEMORY, memory_rows

    rows = memory_rows(catalog, here, data)
    if as_json:
        typer.echo(json.dumps({"memory": rows}, indent=1))
    else:
        print_table(rows, MEMORY)


def describe(model: Model, here: Installed) -> dict[str, Any]:
    return {
        "id": model.id,
        "name": model.name,
        "kind": model.kind,
        "workflows": list(model.workflows),
        "runsOn": model.runs_on,
        "weights": here.status(model),
        "licence": model.licence,
        "aliases": list(model.aliases),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in COLUMNS.values():
        table.add_column(title, no_wrap=title != "licence")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in COLUMNS))
    Console().print(table)


@contextmanager
def report_errors() -> Iterator[None]:
    """Errors end the command with one line on standard error."""
    try:
        yield
    except (PullError, UnknownModel, CatalogError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """A progress bar for each model, on standard error."""
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    bars = rich_progress.Progress(*columns, console=Console(file=sys.stderr))
    tasks: dict[str, TaskID] = {}

    def show(progress: Progress) -> None:
        if progress.model not in tasks:
            bars.start()
            tasks[progress.model] = bars.add_task(progress.model)
        bars.update(tasks[progress.model], completed=progress.done_bytes, total=progress.total_bytes)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
