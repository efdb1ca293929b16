"""Authorization: checks ban, scope, then rate limit, in that order."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from server.accounts import keys, rate_limits, users
from server.accounts.plans import UNLIMITED, Plans
from server.accounts.rate_limits import RateLimitStatus
from server.accounts.users import Caller
from server.db.database import Connection, Database
from server.errors import ScopeRequired, Unauthorized, UserBanned
from server.timestamps import iso

Scope = Literal["generate", "read", "admin"]


@dataclass(frozen=True)
class Access:
    """What a route requires. Only calls that can create work are rate limited: polling a job is free."""

    scope: Scope
    rate_limited: bool


READ = Access("read", rate_limited=False)
GENERATE = Access("generate", rate_limited=True)
CANCEL = Access("generate", rate_limited=False)
ADMIN = Access("admin", rate_limited=False)


class Authorizer:
    """Its methods block: from the event loop, call them through `Database.call`.

    Each returns the caller with their plan, and the state of their rate limits if the call counts. Raises UserBanned,
    ScopeRequired or RateLimited.
    """

    def __init__(self, database: Database, plans: Plans) -> None:
        self.database, self.plans = database, plans

    def authorize_key(self, key: str, access: Access, now: float) -> tuple[Caller, RateLimitStatus | None]:
        """Raises InvalidApiKey, KeyDisabled or KeyExpired besides."""
        return self.authorize(keys.authenticate(self.database.db, key, now), access, now)

    def authorize_local(self, access: Access, now: float) -> tuple[Caller, RateLimitStatus | None]:
        """The one user of an open server."""
        return self.authorize(users.local_user(self.database.db), access, now)

    def authorize(self, caller: Caller, access: Access, now: float) -> tuple[Caller, RateLimitStatus | None]:
        user = _user(self.database.db, caller.user_id)
        _check_ban(user, now)
        _check_scope(caller, access.scope)
        caller = replace(caller, plan=UNLIMITED if caller.is_local else self.plans.of(user["plan"]))
        if not access.rate_limited or caller.is_local:
            return caller, None
        with self.database.atomic() as db:
            key = keys.key_limit(db, caller.key_id)
            return caller, rate_limits.count_call(db, caller.user_id, caller.plan, key, now)


def _user(db: Connection, user_id: str) -> dict[str, Any]:
    sql = "SELECT plan, banned, banReason, banExpires FROM user WHERE id = ? AND deletedAt IS NULL"
    for row in db.query(sql, [user_id]):
        return row
    raise Unauthorized("This account was deleted.")


def _check_ban(user: Mapping[str, Any], now: float) -> None:
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
