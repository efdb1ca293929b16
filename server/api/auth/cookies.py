"""Session cookies and bearer tokens: reads the session of a request and sets the cookies of the response.

Names, values and attributes are exactly Better Auth's. `Set-Cookie` lines are written by hand, since Starlette would
quote the values and add Expires to the lines that clear a cookie.
"""

from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import HTTPConnection, Request

from server.accounts.keys import KEY_PREFIX, authorization_token
from server.accounts.users import Caller
from server.api import origins
from server.api.middleware import add_header
from server.auth import sessions
from server.auth.secret import Secret
from server.auth.sessions import Session, SessionOptions
from server.services import Services

SESSION_MAX_AGE_S = 7 * 24 * 3600
MAX_AGENT_LENGTH = 512


async def session_of(request: Request, services: Services) -> Caller | None:
    """The session's user, or None. Raises InvalidOrigin if a page of another site sent the cookie."""
    if "authorization" not in request.headers and "cookie" not in request.headers:
        return None
    if bearer_token(request, services) is None and cookies_of(request, services).token(request):
        origins.check_call(request, origins.for_pages(request, services.settings))
    session = await current_session(request, services)
    return Caller(user_id=session.user_id, key_id=None, role=session.user["role"]) if session else None


async def current_session(request: Request, services: Services, *, renews: bool = True) -> Session | None:
    """The live session, or None. Once a day it is renewed, and the response sets its cookie again."""
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


async def open_session(request: Request, services: Services, user_id: str, options: SessionOptions) -> str:
    """Opens a session for an authenticated user, sets its cookies and returns its token."""
    secret, now = services.auth.secret, services.clock()
    token = await services.database.transaction(sessions.open_session, secret, user_id, now, **options)
    set_session_cookies(request, services, token, remember=options["remember"])
    return token


def session_options(request: Request, *, remember: bool) -> SessionOptions:
    address = request.client.host if request.client else ""
    agent = request.headers.get("user-agent", "")[:MAX_AGENT_LENGTH]
    return {"address": address, "agent": agent, "remember": remember}


def set_session_cookies(request: Request, services: Services, token: str, *, remember: bool = True) -> None:
    """Sets the session's cookies, and `set-auth-token` for clients without cookies, in the response."""
    for line in cookies_of(request, services).set(token, remember=remember):
        add_header(request, "Set-Cookie", line)
    add_header(request, "set-auth-token", services.auth.secret.sign(token))
    add_header(request, "Access-Control-Expose-Headers", "set-auth-token")


def clear_session_cookies(request: Request, services: Services) -> None:
    for line in cookies_of(request, services).clear():
        add_header(request, "Set-Cookie", line)


def token_of(request: Request, services: Services) -> str | None:
    """The session token. A bearer token takes precedence over the cookie."""
    return bearer_token(request, services) or cookies_of(request, services).token(request)


def bearer_token(request: Request, services: Services) -> str | None:
    """`token` as in JSON responses, or `token.signature` as in `set-auth-token`. API keys are not session tokens."""
    text = authorization_token(request.headers.get("authorization", ""))
    if not text or text.startswith(KEY_PREFIX):
        return None
    return services.auth.secret.unsign(text) if "." in text else text


def api_key(request: Request) -> str | None:
    """An API key in place of a session."""
    token = authorization_token(request.headers.get("authorization", ""))
    return token if token.startswith(KEY_PREFIX) else request.headers.get("x-api-key")


def cookies_of(request: Request, services: Services) -> "Cookies":
    address = services.settings.public_url or str(request.base_url)
    return Cookies(services.auth.secret, secure=address.startswith("https://"))


@dataclass(frozen=True)
class Cookies:
    """The cookies of a server reached over https (`secure`) or http. `set` and `clear` return `Set-Cookie` lines."""

    secret: Secret
    secure: bool

    @property
    def session(self) -> str:
        return self._name("session_token")

    @property
    def dont_remember(self) -> str:
        return self._name("dont_remember")

    def token(self, request: HTTPConnection) -> str | None:
        """The session token of the request, if it was signed with this secret."""
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
        """Also clears `session_data`, which this server never sets: a Better Auth server here before may have."""
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
    """The first cookie of this name, not decoded. Starlette's `request.cookies` has the last."""
    for header in headers:
        for part in header.split(";"):
            key, found, value = part.strip().partition("=")
            if found and key == name:
                return value.strip('"')
    return None
