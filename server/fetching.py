"""One GET of a caller's URL: guarded addresses, few redirects, a deadline, and no more bytes than allowed."""

import ssl
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import anyio
import httpx

from server.addresses import Guard, GuardedTransport
from server.errors import InvalidMedia, MediaUnreachable, TooLarge

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

    def __init__(self, guard: Guard, limits: Limits, tls: ssl.SSLContext | None = None) -> None:
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
