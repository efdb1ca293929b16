"""Who may come in: not banned, with the scope that the route needs, and within the minute's limit. In this order."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlite_utils import Database

from server import accounts, limits
from server.accounts import Caller
from server.clock import iso
from server.errors import ScopeRequired, Unauthorized, UserBanned
from server.limits import KeyLimit, Standing
from server.plans import UNLIMITED, Plans
from server.store import Store

Scope = Literal["generate", "read", "admin"]


@dataclass(frozen=True)
class Need:
    """What a route asks for. Only calls that can make work are counted: whoever waits for a job may look often."""

    scope: Scope
    counted: bool


LOOK = Need("read", counted=False)
MAKE = Need("generate", counted=True)
STOP = Need("generate", counted=False)
RUN_THE_SERVER = Need("admin", counted=False)


class Gate:
    """Blocks: its methods go through `store.call`."""

    def __init__(self, store: Store, plans: Plans) -> None:
        self.store, self.plans = store, plans

    def admit_key(self, key: str, need: Need, now: float) -> tuple[Caller, Standing | None]:
        return self.admit(accounts.authenticate(self.store.db, key, now), need, now)

    def admit_local(self, need: Need, now: float) -> tuple[Caller, Standing | None]:
        return self.admit(accounts.local_user(self.store.db), need, now)

    def admit(self, caller: Caller, need: Need, now: float) -> tuple[Caller, Standing | None]:
        """The caller with their plan, and where they stand if the call counts.

        Raises UserBanned, ScopeRequired or RateLimited.
        """
        user = _user(self.store.db, caller.user_id)
        _refuse_banned(user, now)
        _check_scope(caller, need.scope)
        caller = replace(caller, plan=UNLIMITED if caller.is_local else self.plans.of(user["plan"]))
        if not need.counted or caller.is_local:
            return caller, None
        with self.store.atomic() as db:
            key = _key_limit(db, caller.key_id)
            return caller, limits.count_call(db, caller.user_id, caller.plan, key, now)


def _user(db: Database, user_id: str) -> dict[str, Any]:
    sql = "SELECT plan, banned, banReason, banExpires FROM user WHERE id = ? AND deletedAt IS NULL"
    for row in db.query(sql, [user_id]):
        return row
    raise Unauthorized("This account is gone.")


def _refuse_banned(user: dict[str, Any], now: float) -> None:
    until = user["banExpires"]
    if user["banned"] and not (until and until <= iso(now)):
        why = f": {user['banReason']}" if user["banReason"] else ""
        raise UserBanned(f"This account is banned{f' until {until}' if until else ''}{why}.", until=until)


def _check_scope(caller: Caller, scope: Scope) -> None:
    if scope in caller.scopes:
        return
    has = sorted(caller.scopes)
    what = "this key" if caller.key_id else "this account"
    raise ScopeRequired(f"This needs the scope {scope}; {what} has {', '.join(has)}.", scope=scope, scopes=has)


def _key_limit(db: Database, key_id: str | None) -> KeyLimit | None:
    sql = "SELECT rateLimitEnabled, rateLimitMax, rateLimitTimeWindow, remaining FROM apikey WHERE id = ?"
    for row in db.query(sql, [key_id]):
        quota = row["rateLimitMax"] if row["rateLimitEnabled"] else None
        return KeyLimit(key_id or "", quota, (row["rateLimitTimeWindow"] or 60_000) / 1000, row["remaining"])
    return None
