"""What callers name by URL or upload, made stored images: counted, decoded once, kept; or refused, and nothing left."""

import re
import ssl
from base64 import b64decode
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote_to_bytes

from anyio.to_thread import run_sync
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pipelines.base import InvalidInput
from pipelines.images import ImageInfo, probe
from server.addresses import Guard, Network, Resolve, resolve
from server.decoders import Decoders
from server.errors import AddressRefused, InvalidBody, InvalidMedia, MediaUnreachable
from server.fetching import PIECE_BYTES, Fetcher, Limits, Write
from server.outputs import Draft, Files

FORM_BYTES = 2**16  # what a form may add to its file
SUFFIXES = {"jpeg": ".jpg"}
BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True)
class StoredImage:
    """`fresh`: stored for this request, to be deleted if the request fails. `width` and `height` are upright."""

    name: str
    width: int
    height: int
    mime: str
    size_bytes: int
    fresh: bool


class Media:
    """The door for images. What it raises is in `server.errors`."""

    def __init__(
        self,
        files: Files,
        *,
        offline: bool,
        allowed_networks: Sequence[Network] = (),
        limits: Limits | None = None,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
        decoders: Decoders | None = None,
    ) -> None:
        self.files, self.offline, self.limits = files, offline, limits or Limits()
        self._fetcher = Fetcher(Guard(allowed_networks, resolve), self.limits, tls)
        self._decoders = decoders or Decoders()

    async def image(self, url: str, own_bases: Sequence[str]) -> StoredImage:
        """The image at `url`. `own_bases` are the addresses under which this server's own files are known."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await self._store(partial(self._copy_data_url, url))
        if name := self.files.name_in(url, own_bases):
            return await self._own(name)
        if scheme not in ("http", "https"):
            raise AddressRefused("An image is taken from an https:, http: or data: URL, or one of this server's files.")
        if self.offline:
            raise AddressRefused("This server is offline and fetches nothing: send a data: URL, or upload the image.")
        return await self._store(partial(self._fetcher.copy, url))

    async def upload(self, request: Request) -> StoredImage:
        """The image in the body: a form's field `file`, or the body itself, whatever type it is said to be."""
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await self._store(partial(self._copy_form, request))
        return await self._store(partial(_copy_body, request))

    async def _store(self, copy: Callable[[Write], Awaitable[None]]) -> StoredImage:
        with self.files.draft() as draft:
            await copy(partial(self._append, draft))
            await run_sync(draft.sync)
            info = await _valid(self._decoders.check(draft.path))
            name = self.files.new_name(SUFFIXES.get(info.format, f".{info.format}"))
            draft.keep(name)  # nothing is awaited from here on: who is cancelled later knows the name
            return StoredImage(name, info.width, info.height, info.mime, draft.size_bytes, fresh=True)

    async def _append(self, draft: Draft, piece: bytes) -> None:
        self.limits.check_size(draft.size_bytes + len(piece))
        await run_sync(draft.write, piece)

    async def _own(self, name: str) -> StoredImage:
        """No copy and no second decode: it was made here, or decoded when it came in."""
        path = self.files.path(name)
        try:
            info = await _valid(run_sync(probe, path))
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            raise MediaUnreachable("There is no such file on this server, or no longer.") from None
        return StoredImage(name, info.width, info.height, info.mime, size_bytes, fresh=False)

    async def _copy_data_url(self, url: str, write: Write) -> None:
        self.limits.check_size(len(url) // 3 - FORM_BYTES)  # at most three characters a byte; then the bytes count
        await write(await run_sync(decode_data_url, url))

    async def _copy_form(self, request: Request, write: Write) -> None:
        form = await self._form(request)
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise _invalid_form("The form has no file in its field `file`.")
            while piece := await file.read(PIECE_BYTES):
                await write(piece)
        finally:
            await form.close()

    async def _form(self, request: Request) -> FormData:
        try:
            return await MultiPartParser(request.headers, self._counted(request), max_files=1, max_fields=20).parse()
        except MultiPartException as error:
            raise _invalid_form(error.message) from error

    async def _counted(self, request: Request) -> AsyncGenerator[bytes, None]:
        size_bytes = 0
        async for piece in request.stream():
            size_bytes += len(piece)
            self.limits.check_size(size_bytes - FORM_BYTES)
            yield piece


async def _valid(info: Awaitable[ImageInfo]) -> ImageInfo:
    try:
        return await info
    except InvalidInput as error:
        raise InvalidMedia(str(error)) from error


async def _copy_body(request: Request, write: Write) -> None:
    async for piece in request.stream():
        await write(piece)


def _invalid_form(message: str) -> InvalidBody:
    return InvalidBody(message, issues=[{"path": "file", "message": message}])


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
