"""The session table. Each function is one statement or part of its caller's transaction.

The column `token` holds a hash: a copy of the database must not give access. /list-sessions must return tokens for the
client's `revokeSession({token})`, so `sealed` holds the token encrypted with the secret, which is not in the database.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from sqlite_utils import Database

from server.accounts.users import random_id
from server.auth.secret import Secret, hash_of, random_token
from server.timestamps import instant, iso

DAY_S = 24 * 3600
LIFETIME_S, RENEWAL_INTERVAL_S, FRESH_S = 7 * DAY_S, DAY_S, DAY_S
SHORT_LIFETIME_S = DAY_S
"""The lifetime of a session without "remember me"."""


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
        """Opened without "remember me"."""
        return self.expires_at - self.updated_at <= SHORT_LIFETIME_S

    def is_fresh(self, now: float) -> bool:
        """Opened within the last day: recent enough for sensitive actions."""
        return now - self.created_at < FRESH_S

    def is_due(self, now: float) -> bool:
        """To be renewed."""
        return not self.is_short and self.expires_at - LIFETIME_S + RENEWAL_INTERVAL_S <= now


class SessionOptions(TypedDict):
    """The client that opens a session, and whether it is remembered."""

    address: str
    agent: str
    remember: bool


def open_session(db: Database, secret: Secret, user_id: str, now: float, **options: Unpack[SessionOptions]) -> str:
    """Returns the new session's token. Also deletes the user's expired sessions."""
    token, session_id = random_token(), random_id()
    db.execute("DELETE FROM session WHERE userId = ? AND expiresAt <= ?", [user_id, iso(now)])
    db.table("session").insert(
        {
            "id": session_id,
            "expiresAt": iso(now + (LIFETIME_S if options["remember"] else SHORT_LIFETIME_S)),
            "token": hash_of(token),
            "sealed": secret.seal(token, session_id),
            "createdAt": iso(now),
            "updatedAt": iso(now),
            "ipAddress": options["address"],
            "userAgent": options["agent"],
            "userId": user_id,
        }
    )
    return token


def find(db: Database, token: str, now: float) -> Session | None:
    """The live session of this token. Deletes an expired one. The look-up is by hash: its duration reveals nothing."""
    for row in db.query(f"{SELECT} WHERE session.token = ?", [hash_of(token)]):
        session = _session(row, token)
        if session.expires_at > now and not is_banned(session.user, now):
            return session
        db.execute("DELETE FROM session WHERE id = ?", [session.id])
    return None


def of_user(db: Database, secret: Secret, user_id: str, now: float) -> list[Session]:
    """The user's live sessions, oldest first."""
    rows = db.query(
        f"{SELECT} WHERE session.userId = ? AND session.expiresAt > ? ORDER BY session.createdAt, session.rowid",
        [user_id, iso(now)],
    )
    return [_session(row, secret.unseal(row["s_sealed"], row["s_id"])) for row in rows]


def renew(db: Database, session_id: str, now: float) -> None:
    db.execute(
        "UPDATE session SET expiresAt = ?, updatedAt = ? WHERE id = ?", [iso(now + LIFETIME_S), iso(now), session_id]
    )


def revoke(db: Database, user_id: str, token: str) -> None:
    """Ends one of the user's own sessions; does nothing for another's."""
    db.execute("DELETE FROM session WHERE token = ? AND userId = ?", [hash_of(token), user_id])


def revoke_all(db: Database, user_id: str, except_token: str = "") -> None:
    """Ends all of a user's sessions, or all but the one of `except_token`."""
    db.execute("DELETE FROM session WHERE userId = ? AND token != ?", [user_id, hash_of(except_token)])


def is_banned(user: Mapping[str, Any], now: float) -> bool:
    """Banned, and the ban has not expired."""
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
