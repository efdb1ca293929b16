"""API keys: owns the table `apikey`, in the format of Better Auth's api-key plugin.

Keys are stored hashed. Each function is one statement or part of its caller's transaction.
"""

import base64
import hashlib
import json
import secrets
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from server.accounts.users import SCOPES, Caller, random_id
from server.errors import InvalidApiKey, KeyDisabled, KeyExpired, NotFound, UsageExceeded, invalid_field
from server.timestamps import iso, iso_or_none

KEY_PREFIX = "bnp_"
KEY_LENGTH = 64
START_LENGTH = 6
"""Characters of a key that stay readable, to tell keys apart in lists."""
RESOURCE = "plantain"
"""The name of this server's scopes in `permissions`, which may name other resources too."""
MINUTE_S = 60.0
LAST_USE_INTERVAL_S = 60.0
"""`lastRequest` is written at most this often: it spares a write on most calls."""
SORTABLE = {"name", "createdAt", "updatedAt", "expiresAt", "lastRequest", "enabled", "id"}
SELECT = "SELECT apikey.*, user.email FROM apikey JOIN user ON user.id = apikey.referenceId"


@dataclass(frozen=True)
class KeyLimit:
    """The limits of one API key, besides those of its user's plan. None is no limit.

    `quota` calls in `window_s`, and `remaining_calls` in all.
    """

    key_id: str
    quota: int | None = None
    window_s: float = MINUTE_S
    remaining_calls: int | None = None


def create_key(
    db: Database,
    user_id: str,
    name: str | None,
    now: float,
    *,
    prefix: str = KEY_PREFIX,
    expires_at: float | None = None,
    scopes: Collection[str] | None = None,
    per_minute: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """Returns (id, key). Only this call returns the key in clear. Raises InvalidBody for an unknown scope."""
    key = prefix + "".join(secrets.choice(string.ascii_letters) for _ in range(KEY_LENGTH))
    row = {
        "id": random_id(),
        "name": name,
        "start": key[:START_LENGTH],
        "prefix": prefix,
        "key": hash_of(key),
        "referenceId": user_id,
        "expiresAt": iso_or_none(expires_at),
        "permissions": permissions_of(scopes),
        "metadata": None if metadata is None else json.dumps(metadata),
        **limit_columns(per_minute),
        "createdAt": iso(now),
        "updatedAt": iso(now),
    }
    insert_key(db, row)
    return row["id"], key


def insert_key(db: Database, row: Mapping[str, Any]) -> None:
    """Inserts a complete row, such as one imported from a Better Auth database."""
    db.table("apikey").insert(dict(row))


def authorization_token(authorization: str) -> str:
    """The token of an `Authorization: Bearer …` header; empty without one."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def authenticate(db: Database, key: str, now: float) -> Caller:
    """The caller whose key this is. Raises InvalidApiKey, KeyDisabled or KeyExpired.

    The look-up is by hash, so that its duration reveals nothing about stored keys.
    """
    found = db.query(
        "SELECT apikey.id, referenceId, enabled, expiresAt, lastRequest, permissions, role FROM apikey"
        " JOIN user ON user.id = referenceId WHERE key = ?",
        [hash_of(key)],
    )
    for row in found:
        if not row["enabled"]:
            raise KeyDisabled("This API key was revoked.")
        if row["expiresAt"] and row["expiresAt"] <= iso(now):
            raise KeyExpired("This API key has expired.")
        _record_use(db, row, now)
        return Caller(row["referenceId"], row["id"], row["role"], scopes_of(row["permissions"]))
    raise InvalidApiKey("This API key is not known here.")


def find_key(db: Database, key_id: str | None, user_id: str | None = None) -> dict[str, Any]:
    """The row of a key, with its owner's `email`. Raises NotFound, also if the key is not `user_id`'s."""
    sql = f"{SELECT} WHERE apikey.id = :key AND (:user IS NULL OR referenceId = :user)"
    for row in db.query(sql, {"key": key_id, "user": user_id}):
        return row
    raise NotFound(f"No key {key_id!r}.")


def list_keys(
    db: Database, user_id: str | None = None, *, sort_by: str = "createdAt", descending: bool = False
) -> list[dict[str, Any]]:
    """The rows of all keys, or of one user's, with their owners' `email`. An unsortable `sort_by` is ignored."""
    column = sort_by if sort_by in SORTABLE else "createdAt"
    order = "DESC" if descending else "ASC"
    return list(
        db.query(
            f"{SELECT} WHERE (:user IS NULL OR referenceId = :user)"
            f" ORDER BY apikey.{column} {order}, apikey.rowid {order}",
            {"user": user_id},
        )
    )


def change_key(
    db: Database, key_id: str, changes: Mapping[str, Any], now: float, user_id: str | None = None
) -> dict[str, Any]:
    """Updates columns and returns the row. Raises NotFound, also if the key is not `user_id`'s."""
    find_key(db, key_id, user_id)
    db.table("apikey").update(key_id, {**changes, "updatedAt": iso(now)})
    return find_key(db, key_id)


def revoke_key(db: Database, key_id: str, now: float) -> None:
    """Disables the key at once and keeps its row. Raises NotFound."""
    change_key(db, key_id, {"enabled": 0}, now)


def delete_key(db: Database, key_id: str, user_id: str) -> None:
    """Raises NotFound, also if the key is not `user_id`'s."""
    find_key(db, key_id, user_id)
    db.execute("DELETE FROM apikey WHERE id = ?", [key_id])


def delete_keys_of(db: Database, user_id: str) -> None:
    db.execute("DELETE FROM apikey WHERE referenceId = ?", [user_id])


def key_limit(db: Database, key_id: str | None) -> KeyLimit | None:
    """None for a caller without a key."""
    sql = "SELECT rateLimitEnabled, rateLimitMax, rateLimitTimeWindow, remaining FROM apikey WHERE id = ?"
    for row in db.query(sql, [key_id]):
        quota = row["rateLimitMax"] if row["rateLimitEnabled"] else None
        return KeyLimit(key_id or "", quota, (row["rateLimitTimeWindow"] or 60_000) / 1000, row["remaining"])
    return None


def consume_quota(db: Database, key_id: str) -> None:
    """Takes one of the key's remaining calls. Raises UsageExceeded."""
    sql = "UPDATE apikey SET remaining = remaining - 1 WHERE id = ? AND remaining > 0"
    if not db.execute(sql, [key_id]).rowcount:
        raise UsageExceeded("This API key has no calls left.")


def longest_window_s(db: Database, user_id: str) -> float:
    """The longest rate limit window of a user's keys, in seconds; 0 without one."""
    sql = "SELECT max(rateLimitTimeWindow) / 1000.0 FROM apikey WHERE referenceId = ? AND rateLimitEnabled"
    return db.execute(sql, [user_id]).fetchone()[0] or 0.0


def limit_columns(per_minute: int | None) -> dict[str, Any]:
    return {"rateLimitEnabled": per_minute is not None, "rateLimitTimeWindow": 60_000, "rateLimitMax": per_minute}


def permissions_of(scopes: Collection[str] | None) -> str | None:
    """Scopes as the column `permissions`: JSON, actions by resource. Raises InvalidBody for an unknown scope."""
    for scope in set(scopes or ()) - set(SCOPES):
        raise invalid_field("scopes", f"there is no scope {scope!r}; there are {', '.join(SCOPES)}")
    return None if scopes is None else json.dumps({RESOURCE: sorted(scopes)})


def scopes_of(permissions: str | None) -> frozenset[str] | None:
    """None for a key without scopes, or with those of other resources only."""
    found = json.loads(permissions) if permissions else None
    return frozenset(found[RESOURCE]) if isinstance(found, dict) and RESOURCE in found else None


def hash_of(key: str) -> str:
    """base64url(SHA-256(key)) without padding. A key has 365 random bits, so no slow hash is needed."""
    return base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()).rstrip(b"=").decode()


def _record_use(db: Database, row: Mapping[str, Any], now: float) -> None:
    if row["lastRequest"] is None or row["lastRequest"] < iso(now - LAST_USE_INTERVAL_S):
        db.execute("UPDATE apikey SET lastRequest = ? WHERE id = ?", [iso(now), row["id"]])
