"""The rows of a user's own API keys, as Better Auth's api-key plugin keeps them. `server.accounts` lets keys in."""

import json
import secrets
import string
from collections.abc import Mapping
from typing import Any

from sqlite_utils import Database

from server.accounts import KEY_PREFIX, hash_of, random_id
from server.auth.errors import AuthError
from server.clock import iso, iso_or_none

START_LENGTH, KEY_LENGTH = 6, 64
SORTABLE = {"name", "createdAt", "updatedAt", "expiresAt", "lastRequest", "enabled", "id"}


def create(
    db: Database,
    user_id: str,
    now: float,
    *,
    name: str | None = None,
    prefix: str | None = None,
    expires_at: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Returns the row, and the key in clear, which is stored hashed."""
    start = KEY_PREFIX if prefix is None else prefix
    key = start + "".join(secrets.choice(string.ascii_letters) for _ in range(KEY_LENGTH))
    row = {
        "id": random_id(),
        "name": name,
        "start": key[:START_LENGTH],
        "prefix": start,
        "key": hash_of(key),
        "referenceId": user_id,
        "expiresAt": iso_or_none(expires_at),
        "metadata": None if metadata is None else json.dumps(metadata),
        "createdAt": iso(now),
        "updatedAt": iso(now),
    }
    db.table("apikey").insert(row)
    return of_user(db, user_id, row["id"]), key


def of_user(db: Database, user_id: str, key_id: str | None) -> dict[str, Any]:
    """The key's row. Raises AuthError where there is none, or it is somebody else's."""
    for row in db.query("SELECT * FROM apikey WHERE id = ? AND referenceId = ?", [key_id, user_id]):
        return row
    raise AuthError(404, "KEY_NOT_FOUND", "API Key not found")


def listed(db: Database, user_id: str, *, sort_by: str, descending: bool) -> list[dict[str, Any]]:
    """All of the user's keys, in their order; `sort_by` is one of SORTABLE."""
    column = sort_by if sort_by in SORTABLE else "createdAt"
    order = "DESC" if descending else "ASC"
    rows = db.query(
        f"SELECT * FROM apikey WHERE referenceId = ? ORDER BY {column} {order}, rowid {order}",  # noqa: S608 - see above
        [user_id],
    )
    return list(rows)


def update(db: Database, user_id: str, key_id: str, changes: Mapping[str, Any], now: float) -> dict[str, Any]:
    of_user(db, user_id, key_id)
    db.table("apikey").update(key_id, {**changes, "updatedAt": iso(now)})
    return of_user(db, user_id, key_id)


def delete(db: Database, user_id: str, key_id: str) -> None:
    of_user(db, user_id, key_id)
    db.execute("DELETE FROM apikey WHERE id = ?", [key_id])
