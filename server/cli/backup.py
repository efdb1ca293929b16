"""`plantain backup` and `plantain restore`."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.common import DATA, Data, lock_data, report_errors
from server.db import backup
from server.db.backup import BackupSummary, file_list_path
from server.settings import Settings, SettingsError

Copy = Annotated[Path, typer.Argument(help="The copy of the database.")]


def register(app: typer.Typer) -> None:
    app.command("backup")(back_up)
    app.command("restore")(restore)


def back_up(file: Copy, data: Data = DATA) -> None:
    """Copy the database, the server running or not, and list the files that belong with it."""
    settings = Settings(data=data)
    try:
        summary = backup.back_up(settings.database, settings.files, file)
    except SettingsError as error:
        raise typer.Exit(report_errors(error)) from None
    _tell(f"{file}: {summary.jobs:,} jobs", summary)
    typer.echo(f"Copy the files too: rsync -a --files-from={file_list_path(file)} {settings.files}/ WHERE/")


def restore(file: Copy, data: Data = DATA) -> None:
    """Put a copy of the database in the place of the one there is, which is kept. The server must not be running."""
    settings = Settings(data=data)
    lock = lock_data(settings.data)
    try:
        summary = backup.restore(file, settings.database, settings.files)
    except SettingsError as error:
        raise typer.Exit(report_errors(error)) from None
    finally:
        lock.close()
    _tell(f"{settings.database} is {file}'s again: {summary.jobs:,} jobs", summary)


def _tell(text: str, summary: BackupSummary) -> None:
    typer.echo(
        f"{text}, {len(summary.files):,} files"
        + (f", {len(summary.missing):,} of them missing" if summary.missing else "")
    )
    for name in summary.missing[:10]:
        typer.echo(f"  missing: {name}")
