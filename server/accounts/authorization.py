"""Who may come in: not banned, with the scope that the route needs, and within the minute's limit. In this order."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from server.accounts import keys, rate_limits, users
from server.accounts.plans import UNLIMITED, Plans
from server.accounts.rate_limits import KeyLimit, RateLimitStatus
from server.accounts.users import Caller
from server.db.database import Connection, Database
from server.errors import ScopeRequired, Unauthorized, UserBanned
from server.timestamps import iso

Scope = Literal["generate", "read", "admin"]


@dataclass(frozen=True)
class Access:
    """What a route asks for. Only calls that can make work are counted: whoever waits for a job may look often."""

    scope: Scope
    rate_limited: bool


READ = Access("read", rate_limited=False)
GENERATE = Access("generate", rate_limited=True)
CANCEL = Access("generate", rate_limited=False)
ADMIN = Access("admin", rate_limited=False)


class Authorizer:
    """Blocks: its methods go through `Database.call`."""

    def __init__(self, database: Database, plans: Plans) -> None:
        self.database, self.plans = database, plans

    def authorize_key(self, key: str, need: Access, now: float) -> tuple[Caller, RateLimitStatus | None]:
        return self.authorize(keys.authenticate(self.database.db, key, now), need, now)

    def authorize_local(self, need: Access, now: float) -> tuple[Caller, RateLimitStatus | None]:
        return self.authorize(users.local_user(self.database.db), need, now)

    def authorize(self, caller: Caller, need: Access, now: float) -> tuple[Caller, RateLimitStatus | None]:
        """The caller with their plan, and where they stand if the call counts.

        Raises UserBanned, ScopeRequired or RateLimited.
        """
        user = _user(self.database.db, caller.user_id)
        _refuse_banned(user, now)
        _check_scope(caller, need.scope)
        caller = replace(caller, plan=UNLIMITED if caller.is_local else self.plans.of(user["plan"]))
        if not need.rate_limited or caller.is_local:
            return caller, None
        with self.database.atomic() as db:
            key = _key_limit(db, caller.key_id)
            return caller, rate_limits.count_call(db, caller.user_id, caller.plan, key, now)


def _user(db: Connection, user_id: str) -> dict[str, Any]:
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


def _key_limit(db: Connection, key_id: str | None) -> KeyLimit | None:
    sql = "SELECT rateLimitEnabled, rateLimitMax, rateLimitTimeWindow, remaining FROM apikey WHERE id = ?"
    for row in db.query(sql, [key_id]):
        quota = row["rateLimitMax"] if row["rateLimitEnabled"] else None
        return KeyLimit(key_id or "", quota, (row["rateLimitTimeWindow"] or 60_000) / 1000, row["remaining"])
    return None
