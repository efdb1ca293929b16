"""Credits: an append-only ledger and each user's balance, which is the sum of their entries.

Each function is part of its caller's transaction.
"""

from typing import Any

from sqlite_utils import Database

from server.errors import InsufficientCredits, NotFound


def grant(db: Database, user_id: str, amount: int, note: str, now: float) -> int:
    """Adds credits and returns the balance. A negative amount takes back; raises InsufficientCredits below zero."""
    return _append(db, user_id, "grant", amount, None, note, now)


def charge(db: Database, user_id: str, amount: int, job_id: str, now: float) -> int:
    """Takes the price of a job and returns the balance. Raises InsufficientCredits and then takes nothing."""
    return _append(db, user_id, "charge", -amount, job_id, None, now)


def top_up(db: Database, user_id: str, price: int, now: float) -> None:
    """Grants what the balance lacks for a price: for the one user of an open server, who is never refused."""
    if (lacking := price - balance(db, user_id)) > 0:
        grant(db, user_id, lacking, "open", now)


def refund(db: Database, job_id: str, now: float) -> int | None:
    """Refunds a job's charge, once. Returns the balance; None if it was refunded before or nothing was charged."""
    rows = db.query(
        "SELECT user_id, amount FROM ledger WHERE job_id = :job AND kind = 'charge'"
        " AND NOT EXISTS (SELECT 1 FROM ledger WHERE job_id = :job AND kind = 'refund')",
        {"job": job_id},
    )
    for row in list(rows):
        return _append(db, row["user_id"], "refund", -row["amount"], job_id, None, now)
    return None


def balance(db: Database, user_id: str) -> int:
    for row in db.query("SELECT balance FROM user WHERE id = ?", [user_id]):
        return row["balance"]
    raise NotFound(f"No user {user_id!r}.")


def entries(db: Database, user_id: str, before: int | None, limit: int) -> list[dict[str, Any]]:
    """A user's ledger entries, newest first, with ids under `before`."""
    return list(
        db.query(
            "SELECT * FROM ledger WHERE user_id = ? AND id < ? ORDER BY id DESC LIMIT ?",
            [user_id, before or 2**62, limit],
        )
    )


def _append(
    db: Database, user_id: str, kind: str, amount: int, job_id: str | None, note: str | None, now: float
) -> int:
    rows = list(
        db.query(
            "UPDATE user SET balance = balance + :amount WHERE id = :user AND balance + :amount >= 0 RETURNING balance",
            {"amount": amount, "user": user_id},
        )
    )
    if not rows:
        has = balance(db, user_id)
        raise InsufficientCredits(
            f"Insufficient credits: this needs {-amount}, you have {has}.", required=-amount, balance=has
        )
    db.execute(
        "INSERT INTO ledger (user_id, kind, amount, balance, job_id, note, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [user_id, kind, amount, rows[0]["balance"], job_id, note, now],
    )
    return rows[0]["balance"]
