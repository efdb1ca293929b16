"""Imports users, passwords, live sessions and API keys from a Better Auth database in SQLite.

A user who exists here already, by address or id, is skipped with all their rows: a second run changes nothing, and
restores no revoked session or deleted key.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from server.accounts import keys, ledger, users
from server.auth.credentials import PROVIDER
from server.auth.secret import Secret, hash_of
from server.errors import BadRequest
from server.timestamps import instant, iso

MILLISECONDS_FROM = 1e11
"""Numbers above this are milliseconds, others seconds: drivers differ. As seconds this would be the year 5138."""
KEY_NUMBERS = (
    "refillInterval", "refillAmount", "rateLimitTimeWindow", "rateLimitMax", "requestCount", "remaining",
)  # fmt: skip


@dataclass
class ImportCounts:
    """How many rows of each kind were imported."""

    users: int = 0
    passwords: int = 0
    sessions: int = 0
    keys: int = 0
    skipped: int = 0


def import_database(db: Database, secret: Secret, source: Path, now: float) -> ImportCounts:
    """Part of the caller's transaction. Raises BadRequest if `source` is not a Better Auth database."""
    counts = ImportCounts()
    with _open_source(source) as source_db:
        for user in _rows(source_db, "user"):
            if not _add_user(db, user, now):
                counts.skipped += 1
                continue
            counts.users += 1
            counts.passwords += _add_password(db, source_db, user["id"])
            counts.sessions += _add_sessions(db, source_db, secret, user["id"], now)
            counts.keys += _add_keys(db, source_db, user["id"], now)
    return counts


def summary(counts: ImportCounts) -> str:
    return ", ".join(f"{getattr(counts, field.name)} {field.name}" for field in fields(counts))


def _add_user(db: Database, user: Mapping[str, Any], now: float) -> bool:
    """False if a user with this address or id exists, or the row has no address."""
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


def _add_password(db: Database, source_db: Database, user_id: str) -> int:
    rows = [
        row for row in _rows(source_db, "account", user_id) if row["providerId"] == PROVIDER and row.get("password")
    ]
    for row in rows[:1]:
        names = ("id", "accountId", "providerId", "userId", "password")
        db.table("account").insert({**{name: row[name] for name in names}, **_dates(row)})
    return len(rows[:1])


def _add_sessions(db: Database, source_db: Database, secret: Secret, user_id: str, now: float) -> int:
    """Cookies of imported sessions stay valid if this server has the other one's secret."""
    live = [row for row in _rows(source_db, "session", user_id) if (_date(row["expiresAt"]) or "") > iso(now)]
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


def _add_keys(db: Database, source_db: Database, user_id: str, now: float) -> int:
    """Both servers store keys hashed alike. Expired ones are skipped. `userId` is the column's name before 1.5."""
    rows = [*_rows(source_db, "apikey", user_id, "referenceId"), *_rows(source_db, "apikey", user_id, "userId")]
    live = [row for row in rows if row.get("expiresAt") is None or (_date(row["expiresAt"]) or "") > iso(now)]
    for row in live:
        keys.insert_key(
            db,
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
            },
        )
    return len(live)


@contextmanager
def _open_source(source: Path) -> Iterator[Database]:
    """The source database, read-only."""
    connection = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
    try:
        source_db = Database(connection)
        if missing := {"user", "session", "account"} - set(source_db.table_names()):
            raise BadRequest(f"{source} is not a Better Auth database: it has no table {min(missing)!r}.")
        yield source_db
    except sqlite3.DatabaseError as error:
        raise BadRequest(f"{source} cannot be imported: {error}.") from None
    finally:
        connection.close()


def _rows(
    source_db: Database, table: str, user_id: str | None = None, owner: str = "userId"
) -> Iterator[dict[str, Any]]:
    """All rows of a table, or one user's; none if the table or column is missing: plugins add their own."""
    if table not in source_db.table_names():
        return iter(())
    if user_id is None:
        return iter(list(source_db.table(table).rows))
    if owner not in source_db.table(table).columns_dict:
        return iter(())
    return iter(list(source_db.table(table).rows_where(f'"{owner}" = ?', [user_id])))


def _dates(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: _date(row.get(name)) or iso(0) for name in ("createdAt", "updatedAt")}


def _date(value: object) -> str | None:
    """A date, as ISO text or a number, in our ISO format; None for anything else."""
    if isinstance(value, int | float):
        return iso(value / 1000 if value > MILLISECONDS_FROM else value)
    try:
        return iso(instant(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def _json(value: object) -> str | None:
    """The text if it is valid JSON, else None."""
    try:
        return value if isinstance(value, str) and json.loads(value) is not None else None
    except ValueError:
        return None
