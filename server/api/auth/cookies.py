"""Whose session a request carries, in a cookie or as Better Auth's bearer plugin does; and what the answer sets."""
# FROM server.auth.cookies: Better Auth's cookies: their names, values and attributes, to the letter.  `Set-Cookie` lines are written by hand: Starlette would put quotes round them, and an Expires into the clearing ones.

from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import HTTPConnection, Request

from server.accounts.keys import KEY_PREFIX
from server.accounts.users import Caller
from server.api import origins
from server.api.middleware import add_header
from server.auth import sessions
from server.auth.secret import Secret
from server.auth.sessions import Session, SessionOptions
from server.services import Services

SESSION_MAX_AGE_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Cookies:
    """The cookies of a server that is reached over https (`secure`) or over http."""

    secret: Secret
    secure: bool

    @property
    def session(self) -> str:
        return self._name("session_token")

    @property
    def dont_remember(self) -> str:
        return self._name("dont_remember")

    def token(self, request: HTTPConnection) -> str | None:
        """The session token that came with the request, if it was signed here."""
        return self._signed(request, self.session)

    def is_short(self, request: HTTPConnection) -> bool:
        """Signed in without "remember me": the session ends with the browser, or after a day."""
        return self._signed(request, self.dont_remember) is not None

    def set(self, token: str, *, remember: bool = True) -> list[str]:
        if remember:
            return [self._line(self.session, self.secret.sign(token), SESSION_MAX_AGE_S)]
        return [
            self._line(self.session, self.secret.sign(token), None),
            self._line(self.dont_remember, self.secret.sign("true"), None),
        ]

    def clear(self) -> list[str]:
        """`session_data` is never set here, but a browser may bring one from a server before this one."""
        names = (self.session, self._name("session_data"), self.dont_remember)
        return [self._line(name, "", 0) for name in names]

    def _signed(self, request: HTTPConnection, name: str) -> str | None:
        value = first_cookie(request.headers.getlist("cookie"), name)
        return self.secret.unsign(value) if value else None

    def _name(self, name: str) -> str:
        return f"{'__Secure-' if self.secure else ''}better-auth.{name}"

    def _line(self, name: str, value: str, max_age_s: int | None) -> str:
        age = "" if max_age_s is None else f"; Max-Age={max_age_s}"
        secure = "; Secure" if self.secure else ""
        return f"{name}={quote(value, safe='')}{age}; Path=/; HttpOnly{secure}; SameSite=Lax"


def first_cookie(headers: list[str], name: str) -> str | None:
    """The first one of this name, as it came. Starlette's `request.cookies` would give the last."""
    for header in headers:
        for part in header.split(";"):
            key, found, value = part.strip().partition("=")
            if found and key == name:
                return value.strip('"')
    return None


AGENT_LENGTH = 512


async def session_of(request: Request, services: Services) -> Caller | None:
    """The session's user, or None. Raises InvalidOrigin where another site's page sent the cookie along."""
    if bearer_token(request, services) is None and cookies_of(request, services).token(request):
        origins.check_call(request, origins.for_pages(request, services.settings))
    session = await current_session(request, services)
    return Caller(user_id=session.user_id, key_id=None, role=session.user["role"]) if session else None


async def current_session(request: Request, services: Services, *, renews: bool = True) -> Session | None:
    """The live session. Once a day it is lengthened, and the answer carries its cookie again."""
    token = token_of(request, services)
    if token is None:
        return None
    now = services.clock()
    session = await services.database.run(sessions.find, token, now)
    if session and renews and session.is_due(now) and not cookies_of(request, services).is_short(request):
        await services.database.run(sessions.renew, session.id, now)
        set_session_cookies(request, services, token)
        session = await services.database.run(sessions.find, token, now)
    return session


def token_of(request: Request, services: Services) -> str | None:
    """The bearer token goes before the cookie."""
    return bearer_token(request, services) or cookies_of(request, services).token(request)


def bearer_token(request: Request, services: Services) -> str | None:
    """`token` as JSON answers carry it, or `token.signature` as `set-auth-token` does. API keys are not sessions."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    text = text.strip()
    if scheme.lower() != "bearer" or not text or text.startswith(KEY_PREFIX):
        return None
    return services.auth.secret.unsign(text) if "." in text else text


def api_key(request: Request) -> str | None:
    """A key in place of a session."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and text.strip().startswith(KEY_PREFIX):
        return text.strip()
    return request.headers.get("x-api-key")


def cookies_of(request: Request, services: Services) -> Cookies:
    address = services.settings.public_url or str(request.base_url)
    return Cookies(services.auth.secret, secure=address.startswith("https://"))


def set_session_cookies(request: Request, services: Services, token: str, *, remember: bool = True) -> None:
    """The answer sets the session's cookie, and names it for those who keep none."""
    for line in cookies_of(request, services).set(token, remember=remember):
        add_header(request, "Set-Cookie", line)
    add_header(request, "set-auth-token", services.auth.secret.sign(token))
    add_header(request, "Access-Control-Expose-Headers", "set-auth-token")


def clear_session_cookies(request: Request, services: Services) -> None:
    """The answer clears the session's cookies."""
    for line in cookies_of(request, services).clear():
        add_header(request, "Set-Cookie", line)


async def open_session(request: Request, services: Services, user_id: str, opening: SessionOptions) -> str:
    """A new session of a user who has just shown who they are; its cookie goes with the answer."""
    secret, now = services.auth.secret, services.clock()
    token = await services.database.transaction(sessions.open_session, secret, user_id, now, **opening)
    set_session_cookies(request, services, token, remember=opening["remember"])
    return token


def session_options(request: Request, *, remember: bool) -> SessionOptions:
    address = request.client.host if request.client else ""
    agent = request.headers.get("user-agent", "")[:AGENT_LENGTH]
    return {"address": address, "agent": agent, "remember": remember}
