"""What an admin does to accounts, over HTTP and at the command line alike. Each act is part of its caller's
transaction, and is written into the audit log there.
"""
# FROM server.audit: What admins did: an append-only log, written in the transaction of the act itself.

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
"""What the owner starts with: on one's own machine credits count use, they do not ration it."""


def create_owner(db: Database, now: float) -> str | None:
    """On a database without users, make the first one: an admin. Returns their API key, which is shown once."""
    if db.table("user").count:
        return None
    user_id = users.create_user(db, "owner", "owner@localhost", now, role="admin", plan="studio")
    ledger.grant(db, user_id, OWNER_CREDITS, "owner", now)
    return keys.create_key(db, user_id, "first start", now)


@dataclass(frozen=True)
class Actor:
    """Who acts: an admin over HTTP, or with neither id whoever sits at the server's command line."""

    user_id: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, caller: Caller) -> "Actor":
        return cls(caller.user_id, caller.key_id)


COMMAND_LINE = Actor()


def record(db: Database, actor: Actor, act: str, subject: str, now: float, **detail: Any) -> None:
    """`act` is such as `users.ban`, `subject` the id it was done to. Never anything secret in `detail`."""
    db.execute(
        "INSERT INTO audit (actor_id, actor_key_id, act, subject, detail, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        [actor.user_id, actor.key_id, act, subject, json.dumps(detail), now],
    )


def entries(db: Database, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Newest first, with ids under `before`. `actor` is an e-mail address, or `command line`."""
    return list(
        db.query(
            "SELECT audit.*, coalesce(email, 'command line') AS actor FROM audit LEFT JOIN user ON user.id = actor_id"
            " WHERE audit.id < ? ORDER BY audit.id DESC LIMIT ?",
            [before or 2**62, limit],
        )
    )


@dataclass(frozen=True)
class AdminContext:
    """Who acts, and when."""

    db: Database
    actor: Actor
    now: float

    def note(self, act: str, subject: str, **detail: Any) -> None:
        record(self.db, self.actor, act, subject, self.now, **detail)


def create_user(ctx: AdminContext, email: str, name: str, *, plan: str, role: str = "user") -> str:
    """Returns the id. Raises Conflict for an address that is taken."""
    try:
        user_id = users.create_user(ctx.db, name or email, email, ctx.now, role=role, plan=plan)
    except sqlite3.IntegrityError:
        raise Conflict(f"There is a user with the address {email!r} already.") from None
    ctx.note("users.create", user_id, email=email.lower(), plan=plan, role=role)
    return user_id


def change_user(ctx: AdminContext, user_id: str, **changes: str) -> None:
    """`name`, `plan`, `role`. Raises NotFound; Conflict if nobody would be left to run the server."""
    before = users.user(ctx.db, user_id)
    ctx.db.table("user").update(user_id, {**changes, "updatedAt": iso(ctx.now)})
    _check_admins(ctx.db)
    ctx.note("users.change", user_id, before={column: before[column] for column in changes}, after=changes)


def ban(ctx: AdminContext, user_id: str, reason: str | None = None, until: float | None = None) -> None:
    """At once: sessions end, keys open nothing. Jobs that were paid for are done all the same."""
    users.user(ctx.db, user_id)
    _set_ban(ctx, user_id, banned=True, reason=reason, until=iso_or_none(until))
    ctx.db.execute("DELETE FROM session WHERE userId = ?", [user_id])
    _check_admins(ctx.db)
    ctx.note("users.ban", user_id, reason=reason, until=iso_or_none(until))


def unban(ctx: AdminContext, user_id: str) -> None:
    users.user(ctx.db, user_id)
    _set_ban(ctx, user_id, banned=False, reason=None, until=None)
    ctx.note("users.unban", user_id)


def grant(ctx: AdminContext, user_id: str, amount: int, note: str) -> int:
    """Give credits, or with a negative amount take them back; returns the balance."""
    balance = ledger.grant(ctx.db, user_id, amount, note, ctx.now)
    ctx.note("credits.grant", user_id, amount=amount, note=note, balance=balance)
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
    options: dict[str, Any] = {"scopes": scopes, "per_minute": per_minute}
    key = keys.create_key(ctx.db, user_id, name, ctx.now, expires_at, **options)
    key_id = keys.authenticate(ctx.db, key, ctx.now).key_id or ""
    ctx.note("keys.create", key_id, user=user_id, name=name, scopes=scopes and sorted(scopes), perMinute=per_minute)
    return key_id, key


def revoke_key(ctx: AdminContext, key_id: str) -> None:
    keys.revoke_key(ctx.db, key_id, ctx.now)
    ctx.note("keys.revoke", key_id)


def change_key(ctx: AdminContext, key_id: str, **changes: Any) -> None:
    """`name`, `scopes` (None: not narrowed), `per_minute` (None: no limit of its own). Raises NotFound."""
    keys.key(ctx.db, key_id)
    columns: dict[str, Any] = {"updatedAt": iso(ctx.now)}
    if "name" in changes:
        columns["name"] = changes["name"]
    if "scopes" in changes:
        columns["permissions"] = keys.permissions_of(changes["scopes"])
    if "per_minute" in changes:
        columns |= keys.limit_columns(changes["per_minute"])
    ctx.db.table("apikey").update(key_id, columns)
    ctx.note("keys.change", key_id, **changes)


def list_users(db: Database, before: str | None, limit: int, search: str | None = None) -> list[dict[str, Any]]:
    """The newest first, those who joined before the user `before`; `search` is a part of a name or address."""
    return list(
        db.query(
            "SELECT * FROM user WHERE rowid < coalesce((SELECT rowid FROM user WHERE id = :before), 9e18)"
            " AND (:search IS NULL OR instr(email, lower(:search)) OR instr(lower(name), lower(:search)))"
            " ORDER BY rowid DESC LIMIT :limit",
            {"before": before, "search": search, "limit": limit},
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
        raise Conflict("Somebody has to run the server: this is its last admin.")
