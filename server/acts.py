"""What an admin does to accounts, over HTTP and at the command line alike. Each act is part of its caller's
transaction, and is written into the audit log there.
"""

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from server import accounts, audit, ledger
from server.audit import Actor
from server.clock import iso, iso_or_none
from server.errors import Conflict


@dataclass(frozen=True)
class Acting:
    """Who acts, and when."""

    db: Database
    actor: Actor
    now: float

    def note(self, act: str, subject: str, **detail: Any) -> None:
        audit.note(self.db, self.actor, act, subject, self.now, **detail)


def create_user(it: Acting, email: str, name: str, *, plan: str, role: str = "user") -> str:
    """Returns the id. Raises Conflict for an address that is taken."""
    try:
        user_id = accounts.create_user(it.db, name or email, email, it.now, role=role, plan=plan)
    except sqlite3.IntegrityError:
        raise Conflict(f"There is a user with the address {email!r} already.") from None
    it.note("users.create", user_id, email=email.lower(), plan=plan, role=role)
    return user_id


def change_user(it: Acting, user_id: str, **changes: str) -> None:
    """`name`, `plan`, `role`. Raises NotFound; Conflict if nobody would be left to run the server."""
    before = accounts.user(it.db, user_id)
    it.db.table("user").update(user_id, {**changes, "updatedAt": iso(it.now)})
    _check_admins(it.db)
    it.note("users.change", user_id, before={column: before[column] for column in changes}, after=changes)


def ban(it: Acting, user_id: str, reason: str | None = None, until: float | None = None) -> None:
    """At once: sessions end, keys open nothing. Jobs that were paid for are done all the same."""
    accounts.user(it.db, user_id)
    _set_ban(it, user_id, banned=True, reason=reason, until=iso_or_none(until))
    it.db.execute("DELETE FROM session WHERE userId = ?", [user_id])
    _check_admins(it.db)
    it.note("users.ban", user_id, reason=reason, until=iso_or_none(until))


def unban(it: Acting, user_id: str) -> None:
    accounts.user(it.db, user_id)
    _set_ban(it, user_id, banned=False, reason=None, until=None)
    it.note("users.unban", user_id)


def grant(it: Acting, user_id: str, amount: int, note: str) -> int:
    """Give credits, or with a negative amount take them back; returns the balance."""
    balance = ledger.grant(it.db, user_id, amount, note, it.now)
    it.note("credits.grant", user_id, amount=amount, note=note, balance=balance)
    return balance


def create_key(
    it: Acting,
    user_id: str,
    name: str | None,
    *,
    expires_at: float | None = None,
    scopes: Collection[str] | None = None,
    per_minute: int | None = None,
) -> tuple[str, str]:
    """(id, the key in clear). Raises NotFound for an unknown user."""
    accounts.user(it.db, user_id)
    options: dict[str, Any] = {"scopes": scopes, "per_minute": per_minute}
    key = accounts.create_key(it.db, user_id, name, it.now, expires_at, **options)
    key_id = accounts.authenticate(it.db, key, it.now).key_id or ""
    it.note("keys.create", key_id, user=user_id, name=name, scopes=scopes and sorted(scopes), perMinute=per_minute)
    return key_id, key


def revoke_key(it: Acting, key_id: str) -> None:
    accounts.revoke_key(it.db, key_id, it.now)
    it.note("keys.revoke", key_id)


def change_key(it: Acting, key_id: str, **changes: Any) -> None:
    """`name`, `scopes` (None: not narrowed), `per_minute` (None: no limit of its own). Raises NotFound."""
    accounts.key(it.db, key_id)
    columns: dict[str, Any] = {"updatedAt": iso(it.now)}
    if "name" in changes:
        columns["name"] = changes["name"]
    if "scopes" in changes:
        columns["permissions"] = accounts.permissions_of(changes["scopes"])
    if "per_minute" in changes:
        columns |= accounts.limit_columns(changes["per_minute"])
    it.db.table("apikey").update(key_id, columns)
    it.note("keys.change", key_id, **changes)


def users(db: Database, before: str | None, limit: int, search: str | None = None) -> list[dict[str, Any]]:
    """The newest first, those who joined before the user `before`; `search` is a part of a name or address."""
    return list(
        db.query(
            "SELECT * FROM user WHERE rowid < coalesce((SELECT rowid FROM user WHERE id = :before), 9e18)"
            " AND (:search IS NULL OR instr(email, lower(:search)) OR instr(lower(name), lower(:search)))"
            " ORDER BY rowid DESC LIMIT :limit",
            {"before": before, "search": search, "limit": limit},
        )
    )


def _set_ban(it: Acting, user_id: str, *, banned: bool, reason: str | None, until: str | None) -> None:
    it.db.execute(
        "UPDATE user SET banned = ?, banReason = ?, banExpires = ?, updatedAt = ? WHERE id = ?",
        [banned, reason, until, iso(it.now), user_id],
    )


def _check_admins(db: Database) -> None:
    sql = "SELECT 1 FROM user WHERE role = 'admin' AND NOT banned AND deletedAt IS NULL LIMIT 1"
    if not db.execute(sql).fetchone():
        raise Conflict("Somebody has to run the server: this is its last admin.")
