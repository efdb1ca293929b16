"""Whose session a request carries, in a cookie or as Better Auth's bearer plugin does; and what the answer sets."""

from starlette.requests import Request

from server.accounts import KEY_PREFIX, Caller
from server.auth import origins, session_rows
from server.auth.cookies import Cookies
from server.auth.session_rows import Opening, Session
from server.auth.transaction import in_transaction
from server.envelope import add_header
from server.services import Services

AGENT_LENGTH = 512


async def session_of(request: Request, served: Services) -> Caller | None:
    """The session's user, or None. Raises InvalidOrigin where another site's page sent the cookie along."""
    if bearer_token(request, served) is None and cookies_of(request, served).token(request):
        origins.check_call(request, origins.for_pages(request, served.settings))
    session = await current(request, served)
    return Caller(user_id=session.user_id, key_id=None, role=session.user["role"]) if session else None


async def current(request: Request, served: Services, *, renews: bool = True) -> Session | None:
    """The live session. Once a day it is lengthened, and the answer carries its cookie again."""
    token = token_of(request, served)
    if token is None:
        return None
    now = served.clock()
    session = await served.store.call(session_rows.find, served.store.db, token, now)
    if session and renews and session.is_due(now) and not cookies_of(request, served).is_short(request):
        await served.store.call(session_rows.renew, served.store.db, session.id, now)
        give(request, served, token)
        session = await served.store.call(session_rows.find, served.store.db, token, now)
    return session


def token_of(request: Request, served: Services) -> str | None:
    """The bearer token goes before the cookie."""
    return bearer_token(request, served) or cookies_of(request, served).token(request)


def bearer_token(request: Request, served: Services) -> str | None:
    """`token` as JSON answers carry it, or `token.signature` as `set-auth-token` does. API keys are not sessions."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    text = text.strip()
    if scheme.lower() != "bearer" or not text or text.startswith(KEY_PREFIX):
        return None
    return served.auth.secret.unsign(text) if "." in text else text


def api_key(request: Request) -> str | None:
    """A key in place of a session."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and text.strip().startswith(KEY_PREFIX):
        return text.strip()
    return request.headers.get("x-api-key")


def cookies_of(request: Request, served: Services) -> Cookies:
    address = served.settings.public_url or str(request.base_url)
    return Cookies(served.auth.secret, secure=address.startswith("https://"))


def give(request: Request, served: Services, token: str, *, remember: bool = True) -> None:
    """The answer sets the session's cookie, and names it for those who keep none."""
    for line in cookies_of(request, served).set(token, remember=remember):
        add_header(request, "Set-Cookie", line)
    add_header(request, "set-auth-token", served.auth.secret.sign(token))
    add_header(request, "Access-Control-Expose-Headers", "set-auth-token")


def take(request: Request, served: Services) -> None:
    """The answer clears the session's cookies."""
    for line in cookies_of(request, served).clear():
        add_header(request, "Set-Cookie", line)


async def open_session(request: Request, served: Services, user_id: str, opening: Opening) -> str:
    """A new session of a user who has just shown who they are; its cookie goes with the answer."""
    secret, now = served.auth.secret, served.clock()
    token = await in_transaction(served, session_rows.open_session, secret, user_id, now, **opening)
    give(request, served, token, remember=opening["remember"])
    return token


def opening(request: Request, *, remember: bool) -> Opening:
    address = request.client.host if request.client else ""
    agent = request.headers.get("user-agent", "")[:AGENT_LENGTH]
    return {"address": address, "agent": agent, "remember": remember}
