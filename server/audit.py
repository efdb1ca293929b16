"""What admins did: an append-only log, written in the transaction of the act itself."""

import json
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from server.accounts import Caller


@dataclass(frozen=True)
class Actor:
    """Who acts: an admin over HTTP, or with neither id whoever sits at the server's command line."""

    user_id: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, caller: Caller) -> "Actor":
        return cls(caller.user_id, caller.key_id)


COMMAND_LINE = Actor()


def note(db: Database, actor: Actor, act: str, subject: str, now: float, **detail: Any) -> None:
    """`act` is such as `users.ban`, `subject` the id it was done to. Never anything secret in `detail`."""
    db.execute(
        "INSERT INTO audit (actor_id, actor_key_id, act, subject, detail, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        [actor.user_id, actor.key_id, act, subject, json.dumps(detail), now],
    )


def entries(db: Database, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Newest first, with ids under `before`. `actor` is an e-mail address, or `command line`."""
    return list(
        db.query(
            "SELECT audit.*, coalesce(email, 'command line') AS actor FROM audit LEFT JOIN user ON user.id = actor_id"
            " WHERE audit.id < ? ORDER BY audit.id DESC LIMIT ?",
            [before or 2**62, limit],
        )
    )
