"""Which sites' pages may use a session, and where a person may be sent afterwards. Better Auth's rules."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from server.auth.errors import AuthError
from server.errors import InvalidOrigin
from server.settings import Settings, _is_address, address_of

READING = {"GET", "HEAD", "OPTIONS"}
DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE_PATH = re.compile(r"/(?![/\\])[^\x00-\x1f\x7f\\]*")


@dataclass(frozen=True)
class Origins:
    """`trusted` may hold wildcards. `own` is this server itself; a page of ours is one that was asked for here."""

    own: frozenset[str]
    trusted: tuple[str, ...] = ()

    def trusts(self, origin: str) -> bool:
        return origin in self.own or any(_matches(origin, pattern) for pattern in self.trusted)

    def may_lead_to(self, url: str) -> bool:
        """A path on this server, or an address on a trusted one."""
        if SAFE_PATH.fullmatch(url):
            return not re.search(r"%2f|%5c", url.partition("?")[0], re.IGNORECASE)
        return self.trusts(origin_of(url))


def for_pages(request: Request, settings: Settings) -> Origins:
    """Who may send a cookie along: also whatever address the browser itself says it called."""
    own = {origin_of(address_of(settings)), origin_of(str(request.base_url))}
    return Origins(frozenset(own - {""}), settings.trusted_origins)


def for_redirects(settings: Settings) -> Origins:
    return Origins(frozenset({origin_of(address_of(settings))}), settings.trusted_origins)


def check_call(request: Request, origins: Origins) -> None:
    """A call that a cookie opens. Without an Origin it is no page's, and let through, as `curl -b` is."""
    if request.method in READING:
        return
    headers = request.headers
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site == "same-origin" or (origin is None and site != "cross-site") or (origin and origins.trusts(origin)):
        return
    raise InvalidOrigin("A page of another site may not use this session.")


def check_auth_call(request: Request, origins: Origins, *, signs_in: bool) -> None:
    """On `/api/auth`. `signs_in`: also without a cookie, lest a page sign its visitor in as somebody else."""
    headers = request.headers
    if request.method in READING:
        return
    if "cookie" not in headers:
        if not signs_in or not _is_of_a_page(request):
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
    """`name` as in the body: `callbackURL`, `redirectTo` …"""
    if isinstance(url, str) and url and not origins.may_lead_to(url):
        told = "redirectURL" if name == "redirectTo" else name
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", told).upper()
        raise AuthError(403, f"INVALID_{code}", f"Invalid {told}")


def origin_of(url: str) -> str:
    """`scheme://host[:port]` as browsers write it; empty for what is not a web address."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return ""
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "\\" in url:
        return ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, DEFAULT_PORTS[parts.scheme]) else f":{port}")


def _is_of_a_page(request: Request) -> bool:
    names = ("origin", "referer", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")
    return any(name in request.headers for name in names)


def _matches(origin: str, pattern: str) -> bool:
    """`*` stands for any part of a host. A pattern without a scheme takes both."""
    subject = origin if "://" in pattern else origin.partition("://")[2]
    parts = [re.escape(part) for part in pattern.rstrip("/").lower().split("*")]
    return bool(subject) and re.fullmatch(r"[^/@\\]*".join(parts), subject.lower()) is not None


def check_host(request: Request, settings: Settings) -> None:
    """A name that anyone may point at this machine must not open it to the pages of that name (DNS rebinding).

    Raises InvalidOrigin for a Host that is neither an address nor a name that the operator gave.
    """
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    named = {urlsplit(settings.public_url or "").hostname, settings.host, "localhost"}
    if host not in named and not _is_address(host):
        raise InvalidOrigin(f"This open server is not known as {host!r}. If it is, start it with --public-url.")
