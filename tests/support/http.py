"""A server on loopback that answers exactly the bytes that a test says, well-behaved or not."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from server.errors import PlantainError
from server.files.fetch import Resolve
from server.files.inputs import IMAGE, InputFiles, StoredImage

LOOPBACK = (ipaddress.ip_network("127.0.0.1/32"),)  # and no other of 127.0.0.0/8

Page = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Web:
    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[str] = []
        self.url = ""

    def answer(self, path: str, body: bytes, status: str = "200 OK", **headers: str) -> str:
        """A page with a Content-Length unless `headers` say otherwise; its URL."""
        headers = {"Content-Length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
        head = "".join(f"{name}: {text}\r\n" for name, text in headers.items() if text)

        async def page(writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

        return self.page(path, page)

    def redirect(self, path: str, target: str) -> str:
        return self.answer(path, b"", "302 Found", Location=target)

    def page(self, path: str, page: Page) -> str:
        self.pages[path] = page
        return self.url + path

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            await self.pages[self.requests[-1].split(" ")[1]](writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator["Web"]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=tls)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self


def resolver(*answers: list[str]) -> Resolve:
    """Resolves every name to the next of `answers`; the last one stays."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


async def refused(media: InputFiles, url: str, error: type[PlantainError], match: str | None = None) -> None:
    with pytest.raises(error, match=match) as raised:
        await media.from_url(IMAGE, url, ["http://plantain.example"])
    assert 400 <= raised.value.status < 500
    assert list(media.files.root.iterdir()) == [], "something was left behind"


def is_stored(media: InputFiles, image: StoredImage, content: bytes) -> bool:
    return [path.name for path in media.files.root.iterdir()] == [image.name] and (
        media.files.path(image.name).read_bytes() == content
    )
