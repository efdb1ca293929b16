"""Who calls: users and their API keys. Keys are stored hashed, in the format of Better Auth's api-key plugin."""

import base64
import hashlib
import json
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from server import ledger
from server.clock import iso, iso_or_none
from server.errors import InvalidApiKey, InvalidBody, KeyDisabled, KeyExpired, NotFound
from server.plans import UNLIMITED, Plan

KEY_PREFIX = "bnp_"
RESOURCE = "plantain"
SIGN_UP_CREDITS = 10
OWNER_CREDITS = 100_000
"""What the owner starts with: on one's own machine credits count use, they do not ration it."""


SCOPES = ("generate", "read", "admin")
"""What a key may be for: to make and change things, to look at one's own things, to run the server."""


@dataclass(frozen=True)
class Caller:
    """Whoever a request was authenticated as.

    `granted` are the scopes that the key was made with; None where it was not narrowed, or there is none. `plan` is
    known once the caller was let in. `is_local` is the one user of an open server: charged, and never refused.
    """

    user_id: str
    key_id: str | None
    role: str
    granted: frozenset[str] | None = None
    plan: Plan = UNLIMITED
    is_local: bool = False

    @property
    def scopes(self) -> frozenset[str]:
        if self.granted is not None:
            return self.granted
        return frozenset(SCOPES if self.role == "admin" else SCOPES[:2])


def create_user(db: Database, name: str, email: str, now: float, *, role: str = "user", plan: str = "free") -> str:
    """Returns the new user's id. The sign-up credits are a ledger entry. Part of the caller's transaction."""
    user_id = random_id()
    db.table("user").insert(
        {
            "id": user_id,
            "name": name,
            "email": email.lower(),
            "role": role,
            "plan": plan,
            "createdAt": iso(now),
            "updatedAt": iso(now),
        }
    )
    ledger.grant(db, user_id, SIGN_UP_CREDITS, "sign-up", now)
    return user_id


def create_owner(db: Database, now: float) -> str | None:
    """On a database without users, make the first one: an admin. Returns their API key, which is shown once."""
    if db.table("user").count:
        return None
    user_id = create_user(db, "owner", "owner@localhost", now, role="admin", plan="studio")
    ledger.grant(db, user_id, OWNER_CREDITS, "owner", now)
    return create_key(db, user_id, "first start", now)


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
        issue = {"path": "scopes", "message": f"there is no scope {scope!r}; there are {', '.join(SCOPES)}"}
        raise InvalidBody(f"scopes: {issue['message']}", issues=[issue])
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


def local_user(db: Database) -> Caller:
    """The owner, as the one user of an open server."""
    for row in db.query("SELECT id FROM user WHERE role = 'admin' AND deletedAt IS NULL ORDER BY rowid LIMIT 1"):
        return Caller(row["id"], None, "admin", is_local=True)
    raise NotFound("This server has no admin.")


def user_by_email(db: Database, email: str) -> str:
    """The user's id. Raises NotFound."""
    for row in db.query("SELECT id FROM user WHERE email = ?", [email.lower()]):
        return row["id"]
    raise NotFound(f"No user with the address {email!r}.")


def user(db: Database, user_id: str) -> dict[str, Any]:
    """The user's row. Raises NotFound."""
    for row in db.query("SELECT * FROM user WHERE id = ?", [user_id]):
        return row
    raise NotFound(f"No user {user_id!r}.")


def hash_of(key: str) -> str:
    """base64url(SHA-256(key)) without padding. A key has 365 random bits, so no slow hash is needed."""
    return base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()).rstrip(b"=").decode()


def random_id() -> str:
    """32 letters and digits, as Better Auth's ids are."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(32))


def _note_use(db: Database, row: dict[str, Any], now: float) -> None:
    """Once a minute is enough for "last used", and spares a write on every call."""
    if row["lastRequest"] is None or row["lastRequest"] < iso(now - 60):
        db.execute("UPDATE apikey SET lastRequest = ? WHERE id = ?", [iso(now), row["id"]])
