"""The open server: for one person on their own machine, who needs no key. Refused where others could reach it."""

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from server.errors import InvalidOrigin
from server.settings import Settings, SettingsError


class OpenToAll(SettingsError):
    """`--open` on an address that others can reach."""


def check_settings(settings: Settings) -> None:
    """Raises OpenToAll unless this was said twice."""
    if settings.open and not settings.open_to_the_network and not is_loopback(settings.host):
        raise OpenToAll(
            f"--open lets everyone who reaches {settings.host} do everything, without a key. Listen on 127.0.0.1, "
            "or say --open-to-the-network as well."
        )


def check_host(request: Request, settings: Settings) -> None:
    """A name that anyone may point at this machine must not open it to the pages of that name (DNS rebinding).

    Raises InvalidOrigin for a Host that is neither an address nor a name that the operator gave.
    """
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    named = {urlsplit(settings.public_url or "").hostname, settings.host, "localhost"}
    if host not in named and not _is_address(host):
        raise InvalidOrigin(f"This open server is not known as {host!r}. If it is, start it with --public-url.")


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
