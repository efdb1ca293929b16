"""Admin actions on accounts, for the HTTP API and the command line, and the append-only audit log.

Each action is part of its caller's transaction and writes its audit log entry there.
"""

import json
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from server.accounts import keys, ledger, users
from server.accounts.users import Caller
from server.errors import Conflict
from server.timestamps import iso, iso_or_none

OWNER_CREDITS = 100_000
"""The owner's first balance: on one's own machine credits measure use, they do not ration it."""


@dataclass(frozen=True)
class Actor:
    """Who acts: an admin over HTTP; without ids, the operator at the server's command line."""

    user_id: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, caller: Caller) -> "Actor":
        return cls(caller.user_id, caller.key_id)


COMMAND_LINE = Actor()


@dataclass(frozen=True)
class AdminContext:
    """Who acts, when, and the connection to act on."""

    db: Database
    actor: Actor
    now: float

    def record(self, action: str, subject: str, **detail: Any) -> None:
        """Writes an audit log entry. `action` is such as `users.ban`, `subject` the id acted on; `detail` no secret."""
        self.db.execute(
            "INSERT INTO audit (actor_id, actor_key_id, act, subject, detail, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            [self.actor.user_id, self.actor.key_id, action, subject, json.dumps(detail), self.now],
        )


def create_owner(db: Database, now: float) -> str | None:
    """Creates the first user, an admin, in a database without users. Returns their API key, which is shown once."""
    if db.table("user").count:
        return None
    user_id = users.create_user(db, "owner", "owner@localhost", now, role="admin", plan="studio")
    ledger.grant(db, user_id, OWNER_CREDITS, "owner", now)
    return keys.create_key(db, user_id, "first start", now)[1]


def create_user(ctx: AdminContext, email: str, name: str, *, plan: str, role: str = "user") -> str:
    """Returns the id. Raises Conflict if the address is taken."""
    try:
        user_id = users.create_user(ctx.db, name or email, email, ctx.now, role=role, plan=plan)
    except sqlite3.IntegrityError:
        raise Conflict(f"There is a user with the address {email!r} already.") from None
    ctx.record("users.create", user_id, email=email.lower(), plan=plan, role=role)
    return user_id


def change_user(ctx: AdminContext, user_id: str, **changes: str) -> None:
    """`name`, `plan`, `role`. Raises NotFound; Conflict if no admin would be left."""
    before = users.user(ctx.db, user_id)
    ctx.db.table("user").update(user_id, {**changes, "updatedAt": iso(ctx.now)})
    _check_admins(ctx.db)
    ctx.record("users.change", user_id, before={column: before[column] for column in changes}, after=changes)


def ban(ctx: AdminContext, user_id: str, reason: str | None = None, until: float | None = None) -> None:
    """Ends the user's sessions and blocks their keys at once. Jobs that were paid for still run."""
    users.user(ctx.db, user_id)
    _set_ban(ctx, user_id, banned=True, reason=reason, until=iso_or_none(until))
    ctx.db.execute("DELETE FROM session WHERE userId = ?", [user_id])
    _check_admins(ctx.db)
    ctx.record("users.ban", user_id, reason=reason, until=iso_or_none(until))


def unban(ctx: AdminContext, user_id: str) -> None:
    users.user(ctx.db, user_id)
    _set_ban(ctx, user_id, banned=False, reason=None, until=None)
    ctx.record("users.unban", user_id)


def grant(ctx: AdminContext, user_id: str, amount: int, note: str) -> int:
    """Adds credits, or with a negative amount takes them back. Returns the balance."""
    balance = ledger.grant(ctx.db, user_id, amount, note, ctx.now)
    ctx.record("credits.grant", user_id, amount=amount, note=note, balance=balance)
    return balance


def create_key(
    ctx: AdminContext,
    user_id: str,
    name: str | None,
    *,
    expires_at: float | None = None,
    scopes: Collection[str] | None = None,
    per_minute: int | None = None,
) -> tuple[str, str]:
    """(id, the key in clear). Raises NotFound for an unknown user."""
    users.user(ctx.db, user_id)
    key_id, key = keys.create_key(
        ctx.db, user_id, name, ctx.now, expires_at=expires_at, scopes=scopes, per_minute=per_minute
    )
    ctx.record("keys.create", key_id, user=user_id, name=name, scopes=scopes and sorted(scopes), perMinute=per_minute)
    return key_id, key


def change_key(ctx: AdminContext, key_id: str, **changes: Any) -> None:
    """`name`, `scopes` (None: all of the user's), `per_minute` (None: no limit of its own). Raises NotFound."""
    columns: dict[str, Any] = {}
    if "name" in changes:
        columns["name"] = changes["name"]
    if "scopes" in changes:
        columns["permissions"] = keys.permissions_of(changes["scopes"])
    if "per_minute" in changes:
        columns |= keys.limit_columns(changes["per_minute"])
    keys.change_key(ctx.db, key_id, columns, ctx.now)
    ctx.record("keys.change", key_id, **changes)


def revoke_key(ctx: AdminContext, key_id: str) -> None:
    """Raises NotFound."""
    keys.revoke_key(ctx.db, key_id, ctx.now)
    ctx.record("keys.revoke", key_id)


def list_users(db: Database, before: str | None, limit: int, search: str | None = None) -> list[dict[str, Any]]:
    """Newest first, those created before the user `before`; `search` is a part of a name or address."""
    return list(
        db.query(
            "SELECT * FROM user WHERE rowid < coalesce((SELECT rowid FROM user WHERE id = :before), 9e18)"
            " AND (:search IS NULL OR instr(email, lower(:search)) OR instr(lower(name), lower(:search)))"
            " ORDER BY rowid DESC LIMIT :limit",
            {"before": before, "search": search, "limit": limit},
        )
    )


def audit_entries(db: Database, before: int | None, limit: int) -> list[dict[str, Any]]:
    """The audit log, newest first, with ids under `before`. `actor` is an e-mail address, or `command line`."""
    return list(
        db.query(
            "SELECT audit.*, coalesce(email, 'command line') AS actor FROM audit LEFT JOIN user ON user.id = actor_id"
            " WHERE audit.id < ? ORDER BY audit.id DESC LIMIT ?",
            [before or 2**62, limit],
        )
    )


def _set_ban(ctx: AdminContext, user_id: str, *, banned: bool, reason: str | None, until: str | None) -> None:
    ctx.db.execute(
        "UPDATE user SET banned = ?, banReason = ?, banExpires = ?, updatedAt = ? WHERE id = ?",
        [banned, reason, until, iso(ctx.now), user_id],
    )


def _check_admins(db: Database) -> None:
    sql = "SELECT 1 FROM user WHERE role = 'admin' AND NOT banned AND deletedAt IS NULL LIMIT 1"
    if not db.execute(sql).fetchone():
        raise Conflict("This is the server's last admin; it needs at least one.")
