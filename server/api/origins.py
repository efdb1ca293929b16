"""Origin checks against CSRF, open redirects and DNS rebinding. The first two follow Better Auth's rules."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from server.auth.errors import AuthError
from server.errors import InvalidOrigin
from server.settings import Settings, address_of, is_address

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE_PATH = re.compile(r"/(?![/\\])[^\x00-\x1f\x7f\\]*")


@dataclass(frozen=True)
class Origins:
    """Origins whose pages may use a session: this server's `own` and the `trusted` ones, which may hold wildcards."""

    own: frozenset[str]
    trusted: tuple[str, ...] = ()

    def trusts(self, origin: str) -> bool:
        return origin in self.own or any(_matches(origin, pattern) for pattern in self.trusted)

    def may_redirect_to(self, url: str) -> bool:
        """Whether the URL is a path on this server or an address of a trusted origin."""
        if SAFE_PATH.fullmatch(url):
            return not re.search(r"%2f|%5c", url.partition("?")[0], re.IGNORECASE)
        return self.trusts(origin_of(url))


def for_pages(request: Request, settings: Settings) -> Origins:
    """The origins whose pages may send a cookie, among them the address that the browser called."""
    own = {origin_of(address_of(settings)), origin_of(str(request.base_url))}
    return Origins(frozenset(own - {""}), settings.trusted_origins)


def for_redirects(settings: Settings) -> Origins:
    """The origins that links in mails may redirect to. The Host header is not among them: the sender chooses it."""
    return Origins(frozenset({origin_of(address_of(settings))}), settings.trusted_origins)


def check_call(request: Request, origins: Origins) -> None:
    """Checks a call authenticated by a cookie. Raises InvalidOrigin.

    Without Origin and Sec-Fetch-Site it does not come from a page, such as `curl -b`, and is allowed.
    """
    if request.method in SAFE_METHODS:
        return
    headers = request.headers
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site == "same-origin" or (origin is None and site != "cross-site") or (origin and origins.trusts(origin)):
        return
    raise InvalidOrigin("A page of another site may not use this session.")


def check_auth_call(request: Request, origins: Origins, *, signs_in: bool) -> None:
    """Checks a call to `/api/auth`. Raises AuthError.

    `signs_in`: check it without a cookie too, or a page could sign its visitor in to another account (login CSRF).
    """
    headers = request.headers
    if request.method in SAFE_METHODS:
        return
    if "cookie" not in headers:
        if not signs_in or not _is_from_page(request):
            return
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") == "navigate":
            text = "Cross-site navigation login blocked. This request appears to be a CSRF attack."
            raise AuthError(403, "CROSS_SITE_NAVIGATION_LOGIN_BLOCKED", text)
    origin = headers.get("origin") or origin_of(headers.get("referer", ""))
    if origin == "null" and headers.get("sec-fetch-site") == "same-origin":
        return
    if not origin or origin == "null":
        raise AuthError(403, "MISSING_OR_NULL_ORIGIN", "Missing or null Origin")
    if not origins.trusts(origin):
        raise AuthError(403, "INVALID_ORIGIN", "Invalid origin")


def check_redirect(url: object, name: str, origins: Origins) -> None:
    """`name` is the field of the body: `callbackURL`, `redirectTo`. Raises AuthError."""
    if isinstance(url, str) and url and not origins.may_redirect_to(url):
        label = "redirectURL" if name == "redirectTo" else name
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", label).upper()
        raise AuthError(403, f"INVALID_{code}", f"Invalid {label}")


def origin_of(url: str) -> str:
    """`scheme://host[:port]` as browsers write it; empty if the URL is not http(s)."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return ""
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "\\" in url:
        return ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, DEFAULT_PORTS[parts.scheme]) else f":{port}")


def _is_from_page(request: Request) -> bool:
    names = ("origin", "referer", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")
    return any(name in request.headers for name in names)


def _matches(origin: str, pattern: str) -> bool:
    """`*` matches any part of a host. A pattern without a scheme matches http and https."""
    subject = origin if "://" in pattern else origin.partition("://")[2]
    parts = [re.escape(part) for part in pattern.rstrip("/").lower().split("*")]
    return bool(subject) and re.fullmatch(r"[^/@\\]*".join(parts), subject.lower()) is not None


def check_host(request: Request, settings: Settings) -> None:
    """Protects an open server from DNS rebinding: a page whose name was pointed at this machine.

    Raises InvalidOrigin if the Host is neither an IP address nor a name that the operator configured.
    """
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    named = {urlsplit(settings.public_url or "").hostname, settings.host, "localhost"}
    if host not in named and not is_address(host):
        raise InvalidOrigin(
            f"This open server is not configured for the name {host!r}. If it is its name, start it with --public-url."
        )
