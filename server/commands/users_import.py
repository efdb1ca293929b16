"""`plantain users import`."""

import time
from pathlib import Path

import typer

from server.auth import importer, secret
from server.commands.accounts import Data, changing, users


def register(_: typer.Typer) -> None:
    users.command("import")(import_users)


def import_users(source: Path, data: Data = Path("data")) -> None:
    """Bring users, passwords, sessions and API keys over from a Better Auth database (SQLite).

    For people's cookies to go on working, start the server with the old one's BETTER_AUTH_SECRET, here too.
    """
    if not source.exists():
        raise typer.BadParameter(f"there is no {source}")
    with changing(data) as db:
        brought = importer.bring(db, secret.load(data), source, time.time())
    typer.echo(importer.told(brought))
