"""Better Auth's cookies: their names, values and attributes, to the letter.

`Set-Cookie` lines are written by hand: Starlette would put quotes round them, and an Expires into the clearing ones.
"""

from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import HTTPConnection

from server.auth.secret import Secret

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
