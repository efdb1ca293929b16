"""Brings people over from a Better Auth database in SQLite: users, passwords, live sessions and API keys.

Whoever is here already, by address or id, is left alone with all that is theirs: a second run changes nothing, and
brings back nobody's revoked session or deleted key.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from server.accounts import ledger, users
from server.auth.credentials import PROVIDER
from server.auth.secret import Secret, hash_of
from server.errors import BadRequest
from server.timestamps import instant, iso

MILLISECONDS_FROM = 1e11
"""Drivers that store dates as numbers use milliseconds or seconds; as seconds this would be the year 5138."""
KEY_NUMBERS = (
    "refillInterval", "refillAmount", "rateLimitTimeWindow", "rateLimitMax", "requestCount", "remaining",
)  # fmt: skip


@dataclass
class ImportCounts:
    """How many of each."""

    users: int = 0
    passwords: int = 0
    sessions: int = 0
    keys: int = 0
    skipped: int = 0


def import_database(db: Database, secret: Secret, source: Path, now: float) -> ImportCounts:
    """Part of the caller's transaction. Raises BadRequest for what is no such database."""
    counts = ImportCounts()
    with _opened(source) as theirs:
        for user in _rows(theirs, "user"):
            if not _add_user(db, user, now):
                counts.skipped += 1
                continue
            counts.users += 1
            counts.passwords += _add_password(db, theirs, user["id"])
            counts.sessions += _add_sessions(db, theirs, secret, user["id"], now)
            counts.keys += _add_keys(db, theirs, user["id"], now)
    return counts


def summary(counts: ImportCounts) -> str:
    return ", ".join(f"{getattr(counts, field.name)} {field.name}" for field in fields(counts))


def _add_user(db: Database, user: Mapping[str, Any], now: float) -> bool:
    """False where there is one with this address or id, or the row has none."""
    email = str(user.get("email") or "").lower()
    known = db.query("SELECT 1 FROM user WHERE id = ? OR lower(email) = ?", [user["id"], email])
    if not email or next(iter(known), None):
        return False
    db.table("user").insert(
        {
            "id": user["id"],
            "name": user.get("name") or email,
            "email": email,
            "emailVerified": bool(user.get("emailVerified")),
            "image": user.get("image"),
            "role": "admin" if "admin" in str(user.get("role") or "").split(",") else "user",
            "banned": bool(user.get("banned")),
            "banReason": user.get("banReason"),
            "banExpires": _date(user.get("banExpires")),
            "createdAt": _date(user.get("createdAt")) or iso(now),
            "updatedAt": _date(user.get("updatedAt")) or iso(now),
        }
    )
    ledger.grant(db, user["id"], users.SIGN_UP_CREDITS, "sign-up", now)
    return True


def _add_password(db: Database, theirs: Database, user_id: str) -> int:
    rows = [row for row in _rows(theirs, "account", user_id) if row["providerId"] == PROVIDER and row.get("password")]
    for row in rows[:1]:
        names = ("id", "accountId", "providerId", "userId", "password")
        db.table("account").insert({**{name: row[name] for name in names}, **_dates(row)})
    return len(rows[:1])


def _add_sessions(db: Database, theirs: Database, secret: Secret, user_id: str, now: float) -> int:
    """Their cookies go on working where the secret was counts as well."""
    live = [row for row in _rows(theirs, "session", user_id) if (_date(row["expiresAt"]) or "") > iso(now)]
    for row in live:
        db.table("session").insert(
            {
                "id": row["id"],
                "expiresAt": _date(row["expiresAt"]),
                "token": hash_of(row["token"]),
                "sealed": secret.seal(row["token"], row["id"]),
                "ipAddress": row.get("ipAddress"),
                "userAgent": row.get("userAgent"),
                "userId": user_id,
                **_dates(row),
            }
        )
    return len(live)


def _add_keys(db: Database, theirs: Database, user_id: str, now: float) -> int:
    """Keys are stored hashed, as here; those that have expired are left behind. `userId` was the name before 1.5."""
    rows = [*_rows(theirs, "apikey", user_id, "referenceId"), *_rows(theirs, "apikey", user_id, "userId")]
    live = [row for row in rows if row.get("expiresAt") is None or (_date(row["expiresAt"]) or "") > iso(now)]
    for row in live:
        db.table("apikey").insert(
            {
                "id": row["id"],
                "configId": row.get("configId") or "default",
                "name": row.get("name"),
                "start": row.get("start") or "",
                "prefix": row.get("prefix") or "",
                "key": row["key"],
                "referenceId": user_id,
                "enabled": row.get("enabled") is None or bool(row["enabled"]),
                "rateLimitEnabled": bool(row.get("rateLimitEnabled")),
                **{name: row[name] for name in KEY_NUMBERS if row.get(name) is not None},
                **{name: _date(row.get(name)) for name in ("lastRequest", "lastRefillAt", "expiresAt")},
                **{name: _json(row.get(name)) for name in ("permissions", "metadata")},
                **_dates(row),
            }
        )
    return len(live)


@contextmanager
def _opened(source: Path) -> Iterator[Database]:
    """The other database, read-only."""
    connection = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
    try:
        theirs = Database(connection)
        if missing := {"user", "session", "account"} - set(theirs.table_names()):
            raise BadRequest(f"{source} is no Better Auth database: it has no table {min(missing)!r}.")
        yield theirs
    except sqlite3.DatabaseError as error:
        raise BadRequest(f"{source} cannot be counts over: {error}.") from None
    finally:
        connection.close()


def _rows(theirs: Database, table: str, user_id: str | None = None, owner: str = "userId") -> Iterator[dict[str, Any]]:
    """All rows, or one user's; none where there is no such table or column, as plugins bring their own."""
    if table not in theirs.table_names():
        return iter(())
    if user_id is None:
        return iter(list(theirs.table(table).rows))
    if owner not in theirs.table(table).columns_dict:
        return iter(())
    return iter(list(theirs.table(table).rows_where(f'"{owner}" = ?', [user_id])))


def _dates(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: _date(row.get(name)) or iso(0) for name in ("createdAt", "updatedAt")}


def _date(value: object) -> str | None:
    """ISO text, or a number, as our own ISO text."""
    if isinstance(value, int | float):
        return iso(value / 1000 if value > MILLISECONDS_FROM else value)
    try:
        return iso(instant(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def _json(value: object) -> str | None:
    """JSON text that can be read again, or nothing."""
    try:
        return value if isinstance(value, str) and json.loads(value) is not None else None
    except ValueError:
        return None
