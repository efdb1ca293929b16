"""Sign-up, sign-in, password reset and deletion of users, as functions on an open connection.

Each is one statement or part of its caller's transaction. Passwords arrive hashed.
"""

import sqlite3
from collections.abc import Mapping
from typing import Any, Unpack

from sqlite_utils import Database

from server.accounts import keys, users
from server.auth import sessions
from server.auth.errors import AuthError, banned, invalid_credentials, invalid_token
from server.auth.secret import Secret, hash_of, random_token
from server.auth.sessions import SessionOptions
from server.timestamps import iso

PROVIDER = "credential"
SELECT = (
    "SELECT user.*, account.password FROM user LEFT JOIN account ON account.userId = user.id"
    " AND account.providerId = 'credential' WHERE user.deletedAt IS NULL"
)
RESET_LIFETIME_S = 3600.0
RESET_TOKEN_LENGTH = 24


def sign_up(db: Database, name: str, email: str, image: str | None, password: str, now: float) -> str:
    """Returns the new user's id. Raises AuthError if the address is taken."""
    try:
        user_id = users.create_user(db, name, email, now)
    except sqlite3.IntegrityError:
        text = "User already exists. Use another email."
        raise AuthError(422, "USER_ALREADY_EXISTS_USE_ANOTHER_EMAIL", text) from None
    db.execute("UPDATE user SET image = ? WHERE id = ?", [image, user_id])
    set_password(db, user_id, password, now)
    return user_id


def find_by_email(db: Database, email: str) -> dict[str, Any] | None:
    """The user's row, with the hashed `password` if they have one."""
    return _first(db, "lower(user.email) = ?", email.lower())


def find_by_id(db: Database, user_id: str) -> dict[str, Any] | None:
    return _first(db, "user.id = ?", user_id)


def sign_in(
    db: Database, secret: Secret, user_id: str, password: str, now: float, **session: Unpack[SessionOptions]
) -> str:
    """Returns a new session's token. Raises AuthError.

    `password` is the hash that matched. Hashing takes long enough for the password to have been changed meanwhile, so
    it is compared again here.
    """
    user = find_by_id(db, user_id)
    if user is None or user["password"] != password:
        raise invalid_credentials()
    if sessions.is_banned(user, now):
        raise banned()
    return sessions.open_session(db, secret, user_id, now, **session)


def set_password(db: Database, user_id: str, password: str, now: float) -> None:
    """Also for a user who had no password."""
    db.execute(
        "INSERT INTO account (id, accountId, providerId, userId, password, createdAt, updatedAt)"
        " VALUES (:id, :user, :provider, :user, :password, :now, :now)"
        " ON CONFLICT (userId, providerId) DO UPDATE SET password = :password, updatedAt = :now",
        {"id": users.random_id(), "user": user_id, "provider": PROVIDER, "password": password, "now": iso(now)},
    )


def change_password(db: Database, user_id: str, password: str, now: float) -> None:
    """Sets a password and ends all sessions and resets: the old one may have been known to another person."""
    set_password(db, user_id, password, now)
    db.execute("DELETE FROM verification WHERE value = ?", [user_id])
    sessions.revoke_all(db, user_id)


def update_user(db: Database, user_id: str, changes: Mapping[str, str | None], now: float) -> None:
    db.table("user").update(user_id, {**changes, "updatedAt": iso(now)})


def accounts_of(db: Database, user_id: str) -> list[dict[str, Any]]:
    """The user's sign-in methods."""
    return list(db.query("SELECT * FROM account WHERE userId = ? ORDER BY createdAt", [user_id]))


def open_reset(db: Database, user_id: str, now: float) -> str:
    """Returns a token for one password reset within the hour. It is stored hashed."""
    token = random_token(RESET_TOKEN_LENGTH)
    db.execute("DELETE FROM verification WHERE expiresAt <= ?", [iso(now)])
    db.table("verification").insert(
        {
            "id": users.random_id(),
            "identifier": _identifier(token),
            "value": user_id,
            "expiresAt": iso(now + RESET_LIFETIME_S),
            "createdAt": iso(now),
            "updatedAt": iso(now),
        }
    )
    return token


def is_reset_open(db: Database, token: str, now: float) -> bool:
    rows = db.query("SELECT 1 FROM verification WHERE identifier = ? AND expiresAt > ?", [_identifier(token), iso(now)])
    return next(iter(rows), None) is not None


def reset_password(db: Database, token: str, password: str, now: float) -> None:
    """Uses the token up. Raises AuthError if it was used before or has expired."""
    rows = db.query(
        "DELETE FROM verification WHERE identifier = ? AND expiresAt > ? RETURNING value",
        [_identifier(token), iso(now)],
    )
    for row in list(rows):
        return change_password(db, row["value"], password, now)
    raise invalid_token()


def delete_user(db: Database, user_id: str, now: float) -> list[str]:
    """Deletes all personal data and returns the names of files to delete.

    The anonymised row stays, since the ledger and the jobs refer to it; it cannot be signed in to.
    """
    db.execute("DELETE FROM session WHERE userId = ?", [user_id])
    db.execute("DELETE FROM account WHERE userId = ?", [user_id])
    keys.delete_keys_of(db, user_id)
    db.execute("DELETE FROM verification WHERE value = ?", [user_id])
    db.execute(
        "UPDATE user SET name = 'deleted', email = id || '@deleted.invalid', image = NULL, emailVerified = 0,"
        " role = 'user', deletedAt = :now, updatedAt = :now WHERE id = :id",
        {"id": user_id, "now": iso(now)},
    )
    db.execute(
        "UPDATE job SET params = '{\"seed\": 0}' WHERE user_id = ? AND status NOT IN ('queued', 'running')", [user_id]
    )
    return [row["name"] for row in list(db.query("DELETE FROM file WHERE user_id = ? RETURNING name", [user_id]))]


def _first(db: Database, where: str, value: str) -> dict[str, Any] | None:
    return next(iter(db.query(f"{SELECT} AND {where}", [value])), None)


def _identifier(token: str) -> str:
    return f"reset-password:{hash_of(token)}"
