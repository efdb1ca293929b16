"""Which hosts this server may be sent to fetch from, and an httpx transport that meets no others.

A host is resolved once per hop, every address of it is checked, and the connection goes to one of exactly those:
a name that changes its mind between check and connection (DNS rebinding) gains nothing.
"""

import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence

import anyio
import httpx

from server.errors import AddressRefused, InvalidMedia, MediaUnreachable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

PORTS = {"http": 80, "https": 443}
NUMERIC_HOST = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?", re.IGNORECASE)

GLOBAL_UNICAST_V6 = ipaddress.ip_network("2000::/3")
NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's metadata and DNS; the others' are link-local or private
        "192.88.99.0/24",  # relays of 6to4, which holds any IPv4 address, as Teredo does
        "2002::/16",
        "2001::/23",
        "3fff::/20",  # documentation (RFC 9637), unknown to Python 3.11
    )
)


def is_public(address: Address) -> bool:
    """On the open internet, and nothing else: IPv6 that wraps an IPv4 address (mapped, NAT64 …) is not public."""
    if address.version == 6 and address not in GLOBAL_UNICAST_V6:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in NOT_PUBLIC)


async def resolve(host: str, port: int) -> list[str]:
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [address[0] for *_, address in found]


class Guard:
    """Says where a URL may be fetched from. `allowed_networks` are taken though they are not public."""

    def __init__(self, allowed_networks: Sequence[Network] = (), resolve: Resolve = resolve) -> None:
        self.allowed_networks, self.resolve = allowed_networks, resolve

    async def addresses(self, url: httpx.URL) -> list[str]:
        """The addresses of the URL's host, all of them checked. Raises `AddressRefused` if any may not be met."""
        _check_spelling(url)
        found = await self._resolved(_host(url), _port(url))
        if not all(self._may_meet(address) for address in found):
            raise AddressRefused(
                f"The host {_host(url)} is at a private or otherwise not public address; this server does not fetch "
                "from those unless its operator allows the network."
            )
        return list(dict.fromkeys(found))

    async def _resolved(self, host: str, port: int) -> Sequence[str]:
        try:
            return await self.resolve(host, port)
        except (OSError, UnicodeError) as error:  # the latter for a name that IDNA cannot hold
            raise MediaUnreachable(f"The host {host} was not found.") from error

    def _may_meet(self, text: str) -> bool:
        address = ipaddress.ip_address(text)
        return is_public(address) or any(address in network for network in self.allowed_networks)


def _check_spelling(url: httpx.URL) -> None:
    host = _host(url)
    if not host:
        raise InvalidMedia("This is not a URL: it names no host.")
    if url.scheme not in PORTS:
        raise AddressRefused(f"Only http: and https: URLs are fetched, not {url.scheme}:.")
    if url.userinfo:
        raise AddressRefused("A URL with a user name or password is not fetched.")
    if NUMERIC_HOST.fullmatch(host) and not _is_dotted_quad(host):
        raise AddressRefused(f"{host} is an unusual way to write an address; use a name, or four decimal numbers.")
    if _port(url) not in PORTS.values() and not 1024 <= _port(url) < 2**16:
        raise AddressRefused(f"Port {_port(url)} is not fetched from: only 80, 443 and those from 1024 are.")


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii")


def _port(url: httpx.URL) -> int:
    return PORTS[url.scheme] if url.port is None else url.port


def _is_dotted_quad(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects to checked addresses only. Never through a proxy, and never again over a connection it has open."""

    def __init__(self, guard: Guard, tls: ssl.SSLContext) -> None:
        self._guard = guard
        once = httpx.Limits(max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(verify=tls, trust_env=False, limits=once)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        failure: httpx.TransportError | None = None
        for address in await self._guard.addresses(request.url):
            try:
                return await self._inner.handle_async_request(_pinned(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure or httpx.ConnectError("no address")

    async def aclose(self) -> None:
        await self._inner.aclose()


def _pinned(request: httpx.Request, address: str) -> httpx.Request:
    """The same request to one address; `Host`, SNI and the certificate's check stay with the name."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": _host(request.url)},
    )
