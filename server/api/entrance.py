"""From a request to whoever sent it: an API key, a session, or on an open server anybody at this machine."""

from dataclasses import replace

from fastapi import Request
from sqlite_utils import Database

from server import ledger, limits, open_mode
from server.accounts import KEY_PREFIX, Caller
from server.auth import origins
from server.envelope import set_header
from server.errors import Unauthorized
from server.gate import Need
from server.limits import Standing
from server.services import Services


async def let_in(request: Request, served: Services, need: Need) -> Caller:
    """The caller, let in by the gate. Raises what keeps them out; see `server.errors`.

    A counted call's answer tells how many are left, whatever comes of it.
    """
    caller, standing = await _admitted(request, served, need)
    if standing:
        show_standing(request, standing)
    return caller


def show_standing(request: Request, standing: Standing) -> None:
    request.state.standing = standing
    for name, value in standing.headers().items():
        set_header(request, name, value)


async def read_books(request: Request, served: Services, user_id: str) -> int:
    """The balance as it is now; so are the jobs that the answer's headers count."""
    balance, unfinished = await served.store.call(_books, served.store.db, user_id)
    if standing := getattr(request.state, "standing", None):
        show_standing(request, replace(standing, unfinished=unfinished))
    return balance


def _books(db: Database, user_id: str) -> tuple[int, int]:
    return ledger.balance(db, user_id), limits.unfinished(db, user_id)


async def _admitted(request: Request, served: Services, need: Need) -> tuple[Caller, Standing | None]:
    gate, call, now = served.gate, served.store.call, served.clock()
    if served.settings.open:
        open_mode.check_host(request, served.settings)
        origins.check_call(request, origins.for_pages(request, served.settings))
        return await call(gate.admit_local, need, now)
    token = _token(request)
    if key := token if token.startswith(KEY_PREFIX) else request.headers.get("x-api-key"):
        return await call(gate.admit_key, key, need, now)
    if caller := await _session(request, served):
        return await call(gate.admit, caller, need, now)
    if token:  # a key with a prefix of its own, from another server's database
        return await call(gate.admit_key, token, need, now)
    raise Unauthorized("This needs a session or an API key: send Authorization: Bearer bnp_…")


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _session(request: Request, served: Services) -> Caller | None:
    if "authorization" not in request.headers and "cookie" not in request.headers:
        return None
    from server.auth.sessions import session_of

    return await session_of(request, served)
