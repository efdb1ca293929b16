"""`plantain users password`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from server import accounts
from server.auth import credentials, passwords
from server.commands.accounts import Data, changing, users

Password = Annotated[str, typer.Option(prompt=True, confirmation_prompt=True, hide_input=True)]


def register(_: typer.Typer) -> None:
    users.command("password")(set_password)


def set_password(email: str, password: Password, data: Data = Path("data")) -> None:
    """Let a user sign in with this password, and end their sessions. The owner has none at first."""
    if not passwords.SHORTEST <= passwords.length_of(password) <= passwords.LONGEST:
        raise typer.BadParameter(f"a password has {passwords.SHORTEST} to {passwords.LONGEST} characters")
    with changing(data) as db:
        user_id = accounts.user_by_email(db, email)
        credentials.choose_password(db, user_id, passwords.hash_password(password), time.time())
