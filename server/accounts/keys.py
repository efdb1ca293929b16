"""The rows of a user's own API keys, as Better Auth's api-key plugin keeps them. `server.accounts` lets keys in."""
# FROM server.accounts: Who calls: users and their API keys. Keys are stored hashed, in the format of Better Auth's api-key plugin.

import base64
import hashlib
import json
import secrets
import string
from collections.abc import Collection, Mapping
from typing import Any

from sqlite_utils import Database

from server.accounts.users import SCOPES, Caller, random_id
from server.auth.errors import AuthError
from server.errors import InvalidApiKey, KeyDisabled, KeyExpired, NotFound, invalid_field
from server.timestamps import iso, iso_or_none

KEY_PREFIX = "bnp_"
RESOURCE = "plantain"


def create_key(
    db: Database,
    user_id: str,
    name: str | None,
    now: float,
    expires_at: float | None = None,
    *,
    scopes: Collection[str] | None = None,
    per_minute: int | None = None,
) -> str:
    """Returns the key in clear: it is stored hashed and cannot be shown again. `per_minute` is its own limit."""
    key = KEY_PREFIX + "".join(secrets.choice(string.ascii_letters) for _ in range(64))
    db.table("apikey").insert(
        {
            "id": random_id(),
            "name": name,
            "start": key[:6],
            "prefix": KEY_PREFIX,
            "key": hash_of(key),
            "referenceId": user_id,
            "expiresAt": iso_or_none(expires_at),
            "permissions": permissions_of(scopes),
            **limit_columns(per_minute),
            "createdAt": iso(now),
            "updatedAt": iso(now),
        }
    )
    return key


def permissions_of(scopes: Collection[str] | None) -> str | None:
    """As Better Auth's plugin keeps permissions: actions by resource. Ours is one resource. Raises InvalidBody."""
    for scope in set(scopes or ()) - set(SCOPES):
        raise invalid_field("scopes", f"there is no scope {scope!r}; there are {', '.join(SCOPES)}")
    return None if scopes is None else json.dumps({RESOURCE: sorted(scopes)})


def scopes_of(permissions: str | None) -> frozenset[str] | None:
    """None for a key that was not narrowed, or that was made for another server's resources only."""
    found = json.loads(permissions) if permissions else None
    return frozenset(found[RESOURCE]) if isinstance(found, dict) and RESOURCE in found else None


def limit_columns(per_minute: int | None) -> dict[str, Any]:
    return {"rateLimitEnabled": per_minute is not None, "rateLimitTimeWindow": 60_000, "rateLimitMax": per_minute}


def key(db: Database, key_id: str) -> dict[str, Any]:
    """One of `keys`. Raises NotFound."""
    for row in keys(db, key_id=key_id):
        return row
    raise NotFound(f"No key {key_id!r}.")


def keys(db: Database, user_id: str | None = None, key_id: str | None = None) -> list[dict[str, Any]]:
    """All keys, or one user's, without their hashes, oldest first."""
    return list(
        db.query(
            "SELECT apikey.id, apikey.name, start, enabled, lastRequest, expiresAt, apikey.createdAt, user.email,"
            " referenceId, permissions, rateLimitEnabled, rateLimitMax, rateLimitTimeWindow"
            " FROM apikey JOIN user ON user.id = referenceId WHERE (:user IS NULL OR user.id = :user)"
            " AND (:key IS NULL OR apikey.id = :key)"
            " ORDER BY apikey.createdAt, apikey.rowid",
            {"user": user_id, "key": key_id},
        )
    )


def revoke_key(db: Database, key_id: str, now: float) -> None:
    """The key stops working at once. Raises NotFound."""
    changed = db.execute("UPDATE apikey SET enabled = 0, updatedAt = ? WHERE id = ?", [iso(now), key_id])
    if not changed.rowcount:
        raise NotFound(f"No key {key_id!r}.")


def authenticate(db: Database, key: str, now: float) -> Caller:
    """The caller whose key this is. Raises InvalidApiKey, KeyDisabled or KeyExpired.

    The look-up is by the key's hash, so its timing tells nothing about any stored key.
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
        _note_use(db, row, now)
        return Caller(row["referenceId"], row["id"], row["role"], scopes_of(row["permissions"]))
    raise InvalidApiKey("This API key is not known here.")


def hash_of(key: str) -> str:
    """base64url(SHA-256(key)) without padding. A key has 365 random bits, so no slow hash is needed."""
    return base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()).rstrip(b"=").decode()


def _note_use(db: Database, row: dict[str, Any], now: float) -> None:
    """Once a minute is enough for "last used", and spares a write on every call."""
    if row["lastRequest"] is None or row["lastRequest"] < iso(now - 60):
        db.execute("UPDATE apikey SET lastRequest = ? WHERE id = ?", [iso(now), row["id"]])


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
