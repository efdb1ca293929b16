"""How fal gets to read an input file: as a data URL, or uploaded to its storage.

fal's storage as its official clients use it: the place is asked for, then the file is put there. Only the first request
carries the key.
"""

import base64
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio.to_thread import run_sync

from server.files.fetch import AddressGuard, GuardedTransport
from server.files.store import MIME_TYPES
from server.remote.client import Connection
from server.remote.errors import RemoteFailed, RemoteUnreachable

DATA_URL_BYTES = 4 * 2**20
"""Larger files are uploaded even where data URLs are taken."""
PART_BYTES = 10 * 2**20
WHOLE_BYTES = 90 * 2**20
"""Larger files are uploaded in parts."""
PIECE_BYTES = 2**20
PUT_TIMEOUT = httpx.Timeout(300.0, connect=10.0)


class InputUploader:
    """Files on their way to fal."""

    def __init__(self, connection: Connection, guard: AddressGuard, tls: ssl.SSLContext) -> None:
        self.connection = connection
        transport = GuardedTransport(guard, tls)
        self._bare = httpx.AsyncClient(transport=transport, trust_env=False, timeout=PUT_TIMEOUT)

    async def url(self, path: Path, data_urls: bool) -> str:
        """Under which fal can read the file. Raises RemoteUnreachable or RemoteFailed."""
        mime, size_bytes = MIME_TYPES[path.suffix], (await run_sync(path.stat)).st_size
        if data_urls and size_bytes <= DATA_URL_BYTES and mime.startswith("image/"):
            return await run_sync(_data_url, path, mime)
        try:
            if size_bytes > WHOLE_BYTES:
                return await self._upload_parts(path, mime, size_bytes)
            return await self._upload(path, mime, size_bytes)
        except httpx.HTTPError as error:
            raise RemoteUnreachable("An input could not be uploaded to fal.ai.") from error

    async def close(self) -> None:
        await self._bare.aclose()
        await self.connection.client.aclose()

    async def _upload(self, path: Path, mime: str, size_bytes: int) -> str:
        place = await self._place("initiate", path, mime)
        await self._put(place["upload_url"], path, 0, size_bytes, mime)
        return str(place["file_url"])

    async def _upload_parts(self, path: Path, mime: str, size_bytes: int) -> str:
        """`…/NUMBER` takes a part, `…/complete` their list; the place's query stays on each."""
        place = await self._place("initiate-multipart", path, mime)
        target = httpx.URL(place["upload_url"])
        parts = []
        for number, start in enumerate(range(0, size_bytes, PART_BYTES), 1):
            length = min(PART_BYTES, size_bytes - start)
            answer = await self._put(str(_subpath(target, str(number))), path, start, length, mime)
            parts.append({"partNumber": number, "etag": answer.json()["etag"]})
        _check(await self._bare.post(_subpath(target, "complete"), json={"parts": parts}))
        return str(place["file_url"])

    async def _place(self, how: str, path: Path, mime: str) -> Mapping[str, Any]:
        url = f"{self.connection.rest_url}/storage/upload/{how}?storage_type=fal-cdn-v3"
        answer = _check(await self.connection.ask("POST", url, {"content_type": mime, "file_name": path.name})).json()
        if not {"upload_url", "file_url"} <= answer.keys():
            raise RemoteFailed("fal.ai's storage named no place for an input.")
        return answer

    async def _put(self, url: str, path: Path, start: int, length: int, mime: str) -> httpx.Response:
        headers = {"Content-Type": mime, "Content-Length": str(length)}
        return _check(await self._bare.put(url, content=_pieces(path, start, length), headers=headers))


def _check(response: httpx.Response) -> httpx.Response:
    if not response.is_success:
        raise RemoteFailed(f"fal.ai's storage refused an input with {response.status_code}.")
    return response


def _subpath(url: httpx.URL, name: str) -> httpx.URL:
    return url.copy_with(path=f"{url.path.rstrip('/')}/{name}")


async def _pieces(path: Path, start: int, length: int) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(start)
        while length and (piece := await file.read(min(PIECE_BYTES, length))):
            length -= len(piece)
            yield piece


def _data_url(path: Path, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
