"""`plantain users`, `keys` and `credits`: straight on the database, with the server running or not."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.accounts import admin, keys, ledger, users
from server.accounts.plans import Plans
from server.auth import credentials, importer, passwords, secret
from server.cli.common import DATA, Data, Email, admin_context, open_database, print_table
from server.settings import Settings
from server.timestamps import iso

Role = Literal["user", "admin"]
Password = Annotated[str, typer.Option(prompt=True, confirmation_prompt=True, hide_input=True)]
OWNER = "owner@localhost"
DAY_S = 86_400.0

users_app = typer.Typer(no_args_is_help=True, help="Users.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys.")
credits_app = typer.Typer(no_args_is_help=True, help="Credits of users.")


def register(app: typer.Typer) -> None:
    app.add_typer(users_app, name="users")
    app.add_typer(keys_app, name="keys")
    app.add_typer(credits_app, name="credits")


@users_app.command("create")
def create_user(email: str, name: str = "", plan: str = "free", role: Role = "user", data: Data = DATA) -> None:
    """Add a user, with the sign-up credits, and print their first API key."""
    with admin_context(data) as ctx:
        user_id = admin.create_user(ctx, email, name, plan=plans(data).known(plan), role=role)
        typer.echo(admin.create_key(ctx, user_id, "first")[1])


@users_app.command("list")
def list_users(data: Data = DATA) -> None:
    """List all users with their balances."""
    with open_database(data) as db:
        rows = list(db.query("SELECT *, iif(banned, 'banned', '') AS ban FROM user ORDER BY createdAt"))
    print_table(rows, ["email", "name", "role", "plan", "balance", "ban", "createdAt"])


@users_app.command("change")
def change_user(
    email: str, plan: str | None = None, role: Annotated[Role | None, typer.Option()] = None, data: Data = DATA
) -> None:
    """Change a user's plan or role."""
    with admin_context(data) as ctx:
        changes = {"plan": plan and plans(data).known(plan), "role": role}
        user_id = users.user_by_email(ctx.db, email)
        admin.change_user(ctx, user_id, **{name: value for name, value in changes.items() if value})


@users_app.command("ban")
def ban_user(email: str, reason: str | None = None, data: Data = DATA) -> None:
    """Ban a user: end their sessions and block their keys at once."""
    with admin_context(data) as ctx:
        admin.ban(ctx, users.user_by_email(ctx.db, email), reason)


@users_app.command("unban")
def unban_user(email: str, data: Data = DATA) -> None:
    """Lift a user's ban."""
    with admin_context(data) as ctx:
        admin.unban(ctx, users.user_by_email(ctx.db, email))


@users_app.command("import")
def import_users(source: Path, data: Data = Path("data")) -> None:
    """Import users, passwords, sessions and API keys from a Better Auth database (SQLite).

    To keep cookies valid, run this and the server with the old server's BETTER_AUTH_SECRET.
    """
    if not source.exists():
        raise typer.BadParameter(f"there is no {source}")
    with open_database(data) as db:
        counts = importer.import_database(db, secret.load(data), source, time.time())
    typer.echo(importer.summary(counts))


@users_app.command("password")
def set_password(email: str, password: Password, data: Data = Path("data")) -> None:
    """Set a user's password and end their sessions. The owner has no password at first."""
    if not passwords.MIN_LENGTH <= passwords.length_of(password) <= passwords.MAX_LENGTH:
        raise typer.BadParameter(f"a password has {passwords.MIN_LENGTH} to {passwords.MAX_LENGTH} characters")
    with open_database(data) as db:
        user_id = users.user_by_email(db, email)
        credentials.change_password(db, user_id, passwords.hash_password(password), time.time())


@keys_app.command("create")
def create_key(
    user: Email = OWNER,
    name: str | None = None,
    scope: Annotated[list[str] | None, typer.Option(help="generate, read or admin; repeatable. [all]")] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute, besides the plan's limit.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Until it expires. [never]")] = None,
    data: Data = DATA,
) -> None:
    """Create a key and print it: it cannot be shown again."""
    with admin_context(data) as ctx:
        user_id = users.user_by_email(ctx.db, user)
        expires_at = None if days is None else ctx.now + days * DAY_S
        typer.echo(admin.create_key(ctx, user_id, name, expires_at=expires_at, scopes=scope, per_minute=per_minute)[1])


@keys_app.command("list")
def list_keys(data: Data = DATA) -> None:
    """List all keys by their first characters."""
    with open_database(data) as db:
        rows = keys.list_keys(db)
    for row in rows:
        row["works"] = "yes" if row["enabled"] else "revoked"
        row["scopes"] = " ".join(sorted(keys.scopes_of(row["permissions"]) or ()))
        row["a minute"] = row["rateLimitMax"] if row["rateLimitEnabled"] else None
    print_table(
        rows, ["id", "email", "name", "start", "works", "scopes", "a minute", "lastRequest", "expiresAt", "createdAt"]
    )


@keys_app.command("revoke")
def revoke_key(key_id: str, data: Data = DATA) -> None:
    """Revoke a key at once."""
    with admin_context(data) as ctx:
        admin.revoke_key(ctx, key_id)


@credits_app.command("grant")
def grant(amount: int, user: Email = OWNER, note: str = "granted", data: Data = DATA) -> None:
    """Grant credits (a negative amount takes them back) and print the balance."""
    with admin_context(data) as ctx:
        typer.echo(admin.grant(ctx, users.user_by_email(ctx.db, user), amount, note))


@credits_app.command("ledger")
def show_ledger(user: Email = OWNER, limit: int = 30, data: Data = DATA) -> None:
    """List a user's grants, charges and refunds, newest first."""
    with open_database(data) as db:
        rows = ledger.entries(db, users.user_by_email(db, user), None, limit)
    for row in rows:
        row["at"] = iso(row["created_at"])
    print_table(rows, ["id", "kind", "amount", "balance", "job_id", "note", "at"])


def plans(data: Path) -> Plans:
    return Plans.load(Settings(data=data).plans_toml)
