"""Users, and the caller that a request is authenticated as."""

import secrets
import string
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from server.accounts import ledger
from server.accounts.plans import UNLIMITED, Plan
from server.errors import NotFound
from server.timestamps import iso

SIGN_UP_CREDITS = 10
SCOPES = ("generate", "read", "admin")
"""What a key may allow: to create and change, to read one's own data, to administer the server."""


@dataclass(frozen=True)
class Caller:
    """The user, and the API key if any, that a request is authenticated as.

    `granted` are the scopes of the key; None without a key or for a key with all of its user's. `plan` is known once
    the caller is authorized. `is_local` is the one user of an open server: charged, and never refused.
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
    """Returns the new user's id. The sign-up credits are a ledger entry.

    Raises sqlite3.IntegrityError if the address is taken.
    """
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


def random_id() -> str:
    """32 letters and digits, the format of Better Auth's ids."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(32))
