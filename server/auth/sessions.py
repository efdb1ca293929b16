"""The rows of sessions.

`token` is the token's hash, as `Authorization: Bearer <token>` opens a session without any signature: a copy of the
database must not be a bunch of keys. But /list-sessions has to give tokens back, for the client's
`revokeSession({token})`: so `sealed` is the token, encrypted with the server's secret, which is not in the database.

Each function is part of its caller's transaction, or one statement.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from sqlite_utils import Database

from server.accounts.users import random_id
from server.auth.secret import Secret, hash_of, random_token
from server.timestamps import instant, iso

DAY_S = 24 * 3600
LIVES_S, RENEWED_AFTER_S, FRESH_S = 7 * DAY_S, DAY_S, DAY_S
SHORT_S = DAY_S
"""How long one lives that was opened without "remember me"."""


@dataclass(frozen=True)
class Session:
    """A live session and its user's row."""

    id: str
    user_id: str
    token: str = field(repr=False)
    created_at: float
    updated_at: float
    expires_at: float
    address: str
    agent: str
    user: Mapping[str, Any] = field(repr=False)

    @property
    def is_short(self) -> bool:
        return self.expires_at - self.updated_at <= SHORT_S

    def is_fresh(self, now: float) -> bool:
        return now - self.created_at < FRESH_S

    def is_due(self, now: float) -> bool:
        return not self.is_short and self.expires_at - LIVES_S + RENEWED_AFTER_S <= now


class SessionOptions(TypedDict):
    """From where a session is opened, and for how long."""

    address: str
    agent: str
    remember: bool


def open_session(db: Database, secret: Secret, user_id: str, now: float, **opening: Unpack[SessionOptions]) -> str:
    """Returns the new session's token. The user's dead sessions are swept out on the way."""
    token, session_id = random_token(), random_id()
    db.execute("DELETE FROM session WHERE userId = ? AND expiresAt <= ?", [user_id, iso(now)])
    db.table("session").insert(
        {
            "id": session_id,
            "expiresAt": iso(now + (LIVES_S if opening["remember"] else SHORT_S)),
            "token": hash_of(token),
            "sealed": secret.seal(token, session_id),
            "createdAt": iso(now),
            "updatedAt": iso(now),
            "ipAddress": opening["address"],
            "userAgent": opening["agent"],
            "userId": user_id,
        }
    )
    return token


def find(db: Database, token: str, now: float) -> Session | None:
    """The live session of this token. A dead one's row is deleted. The look-up is by hash: its timing tells nothing."""
    for row in db.query(f"{SELECT} WHERE session.token = ?", [hash_of(token)]):
        session = _session(row, token)
        if session.expires_at > now and not is_banned(session.user, now):
            return session
        db.execute("DELETE FROM session WHERE id = ?", [session.id])
    return None


def of_user(db: Database, secret: Secret, user_id: str, now: float) -> list[Session]:
    """Live ones, oldest first."""
    rows = db.query(
        f"{SELECT} WHERE session.userId = ? AND session.expiresAt > ? ORDER BY session.createdAt, session.rowid",
        [user_id, iso(now)],
    )
    return [_session(row, secret.unseal(row["s_sealed"], row["s_id"])) for row in rows]


def renew(db: Database, session_id: str, now: float) -> None:
    db.execute(
        "UPDATE session SET expiresAt = ?, updatedAt = ? WHERE id = ?", [iso(now + LIVES_S), iso(now), session_id]
    )


def revoke(db: Database, user_id: str, token: str) -> None:
    """Only the user's own."""
    db.execute("DELETE FROM session WHERE token = ? AND userId = ?", [hash_of(token), user_id])


def revoke_all(db: Database, user_id: str, but: str = "") -> None:
    """All of a user's sessions, or all but the one of the token `but`."""
    db.execute("DELETE FROM session WHERE userId = ? AND token != ?", [user_id, hash_of(but)])


def is_banned(user: Mapping[str, Any], now: float) -> bool:
    """Banned for good, or not yet to the end."""
    return bool(user["banned"]) and (user["banExpires"] is None or user["banExpires"] > iso(now))


SELECT = (
    "SELECT session.id AS s_id, session.sealed AS s_sealed, session.userId AS s_userId,"
    " session.createdAt AS s_createdAt, session.updatedAt AS s_updatedAt, session.expiresAt AS s_expiresAt,"
    " session.ipAddress AS s_ipAddress, session.userAgent AS s_userAgent, user.*"
    " FROM session JOIN user ON user.id = session.userId"
)


def _session(row: Mapping[str, Any], token: str) -> Session:
    return Session(
        id=row["s_id"],
        user_id=row["s_userId"],
        token=token,
        created_at=instant(row["s_createdAt"]),
        updated_at=instant(row["s_updatedAt"]),
        expires_at=instant(row["s_expiresAt"]),
        address=row["s_ipAddress"] or "",
        agent=row["s_userAgent"] or "",
        user={name: value for name, value in row.items() if not name.startswith("s_")},
    )
