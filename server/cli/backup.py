"""`plantain backup` and `plantain restore`."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.common import DATA, Data, lock_data, print_error
from server.db import backup
from server.db.backup import BackupSummary, file_list_path
from server.settings import Settings, SettingsError

Copy = Annotated[Path, typer.Argument(help="The backup of the database.")]


def register(app: typer.Typer) -> None:
    app.command("backup")(back_up)
    app.command("restore")(restore)


def back_up(file: Copy, data: Data = DATA) -> None:
    """Back up the database, also of a running server, and list the files that belong with it."""
    settings = Settings(data=data)
    try:
        summary = backup.back_up(settings.database, settings.files, file)
    except SettingsError as error:
        raise typer.Exit(print_error(error)) from None
    _print_summary(f"{file}: {summary.jobs:,} jobs", summary)
    typer.echo(f"Copy the files too: rsync -a --files-from={file_list_path(file)} {settings.files}/ WHERE/")


def restore(file: Copy, data: Data = DATA) -> None:
    """Replace the database with a backup, and keep the old one. The server must not be running."""
    settings = Settings(data=data)
    lock = lock_data(settings.data)
    try:
        summary = backup.restore(file, settings.database, settings.files)
    except SettingsError as error:
        raise typer.Exit(print_error(error)) from None
    finally:
        lock.close()
    _print_summary(f"Restored {settings.database} from {file}: {summary.jobs:,} jobs", summary)


def _print_summary(text: str, summary: BackupSummary) -> None:
    typer.echo(
        f"{text}, {len(summary.files):,} files"
        + (f", {len(summary.missing):,} of them missing" if summary.missing else "")
    )
    for name in summary.missing[:10]:
        typer.echo(f"  missing: {name}")
