"""Fetches a caller's URL: one GET with guarded addresses (SSRF), few redirects, a deadline and a size limit.

A host is resolved once per hop, every address is checked, and the connection goes to one of exactly those addresses, so
that a name whose address changes between check and connection (DNS rebinding) gains nothing.
"""

import ipaddress
import re
import socket
import ssl
import zlib
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote_to_bytes

import anyio
import httpx

from server.errors import AddressRefused, InvalidMedia, MediaUnreachable, TooLarge

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


class AddressGuard:
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

    def __init__(self, guard: AddressGuard, tls: ssl.SSLContext) -> None:
        self._guard = guard
        once = httpx.Limits(max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(verify=tls, trust_env=False, limits=once)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        failure: httpx.TransportError | None = None
        for address in await self._guard.addresses(request.url):
            try:
                return await self._inner.handle_async_request(_pinned_request(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure or httpx.ConnectError("no address")

    async def aclose(self) -> None:
        await self._inner.aclose()


def _pinned_request(request: httpx.Request, address: str) -> httpx.Request:
    """The same request to one address; `Host`, SNI and the certificate's check stay with the name."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": _host(request.url)},
    )


Write = Callable[[bytes], Awaitable[None]]

PIECE_BYTES = 2**18
GZIP = 31  # zlib's `wbits`: the largest window, a gzip header
HEADERS = {"User-Agent": "Plantain", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 32 * 2**20
    connect_s: float = 5.0
    fetch_s: float = 30.0
    redirects: int = 3
    noun: str = "image"
    accept: str = "image/*"

    def check_size(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise TooLarge(f"The {self.noun} is larger than the {self.max_bytes / 2**20:g} MiB that are taken.")


class Fetcher:
    """A client for each fetch: no cookie and no connection is shared between callers."""

    def __init__(self, guard: AddressGuard, limits: Limits, tls: ssl.SSLContext | None = None) -> None:
        self._guard, self._limits = guard, limits
        self._tls = tls or httpx.create_ssl_context()

    async def copy(self, url: str, write: Write) -> None:
        """Hand what is at `url` to `write`, piece by piece."""
        try:
            with anyio.fail_after(self._limits.fetch_s):
                async with self._client() as client, aclosing(await self._answer(client, url)) as response:
                    await self._copy_answer(response, write)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise MediaUnreachable("The URL's server did not answer, or not to the end, in time.") from error
        except httpx.InvalidURL as error:
            raise InvalidMedia(f"This is not a URL: {error}.") from error
        except httpx.HTTPError as error:
            raise MediaUnreachable(f"The URL could not be fetched: {error or type(error).__name__}.") from error

    def _client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self._limits.fetch_s, connect=self._limits.connect_s)
        transport = GuardedTransport(self._guard, self._tls)
        headers = HEADERS | {"Accept": self._limits.accept}
        return httpx.AsyncClient(transport=transport, trust_env=False, timeout=timeout, headers=headers)

    async def _answer(self, client: httpx.AsyncClient, url: str) -> httpx.Response:
        """Redirects by hand: httpx would read each one's body, however long, into memory."""
        request = client.build_request("GET", url)
        for _ in range(self._limits.redirects + 1):
            response = await client.send(request, stream=True)
            if response.next_request is None:
                return response
            await response.aclose()
            request = response.next_request
        raise MediaUnreachable(f"The URL redirects more than {self._limits.redirects} times.")

    async def _copy_answer(self, response: httpx.Response, write: Write) -> None:
        if not response.is_success:
            raise MediaUnreachable(f"{response.url.host} answered {response.status_code}.")
        declared = response.headers.get("content-length", "")
        self._limits.check_size(int(declared) if declared.isdecimal() else 0)
        decode = _decoder(response)
        async for chunk in response.aiter_raw(PIECE_BYTES):
            for piece in decode(chunk):
                await write(piece)


def _decoder(response: httpx.Response) -> Callable[[bytes], Iterable[bytes]]:
    """Plain is asked for. Gzip is taken nevertheless, but in bounded pieces, unlike httpx's own."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return lambda chunk: (chunk,)
    if encoding == "gzip":
        return partial(_inflated, zlib.decompressobj(GZIP))
    raise MediaUnreachable(f"{response.url.host} answered in the encoding {encoding!r}, which was not asked for.")


def _inflated(inflater: "zlib._Decompress", chunk: bytes) -> Iterator[bytes]:
    try:
        while not inflater.eof and (piece := inflater.decompress(chunk, PIECE_BYTES)):
            chunk = inflater.unconsumed_tail
            yield piece
    except zlib.error as error:
        raise MediaUnreachable("The answer was declared to be gzip and is not.") from error


BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def decode_data_url(url: str) -> bytes:
    """RFC 2397, strictly. The media type is not believed, so not read: the bytes say what they are."""
    header, comma, data = url.partition(",")
    if not comma or not data.isascii() or BROKEN_ESCAPE.search(data):
        raise InvalidMedia("This is not a data: URL: `data:image/png;base64,` and the image in base64 is one.")
    content = unquote_to_bytes(data)
    if not header.lower().endswith(";base64"):
        return content
    try:
        return b64decode(content, validate=True)
    except ValueError as error:
        raise InvalidMedia(f"The data: URL is not valid base64: {error}.") from error
