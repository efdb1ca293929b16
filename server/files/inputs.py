"""Input videos and audio by URL, made stored files: counted, decoded once, kept; or refused, and nothing left."""
# FROM server.media: What callers name by URL or upload, made stored images: counted, decoded once, kept; or refused, and nothing left.

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import httpx
from anyio.to_thread import run_sync
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pipelines.base import InvalidInput
from pipelines.media.audio import AudioInfo, check_audio_decodes
from pipelines.media.images import ImageInfo, probe
from pipelines.media.video import VideoInfo, check_video_decodes
from server.errors import AddressRefused, InvalidMedia, MediaUnreachable, invalid_field
from server.files import fetch
from server.files.decoders import ImageDecoders
from server.files.fetch import PIECE_BYTES, AddressGuard, Fetcher, Limits, Network, Resolve, Write, decode_data_url
from server.files.store import FileStore, PendingFile

FORM_BYTES = 2**16  # what a form may add to its file
SUFFIXES = {"jpeg": ".jpg"}


@dataclass(frozen=True)
class StoredImage:
    """`fresh`: stored for this request, to be deleted if the request fails. `width` and `height` are upright."""

    name: str
    width: int
    height: int
    mime: str
    size_bytes: int
    fresh: bool


class ImageInputs:
    """The door for images. What it raises is in `server.errors`."""

    def __init__(
        self,
        files: FileStore,
        *,
        offline: bool,
        allowed_networks: Sequence[Network] = (),
        limits: Limits | None = None,
        resolve: Resolve = fetch.resolve,
        tls: ssl.SSLContext | None = None,
        decoders: ImageDecoders | None = None,
    ) -> None:
        self.files, self.offline, self.limits = files, offline, limits or Limits()
        self._fetcher = Fetcher(AddressGuard(allowed_networks, resolve), self.limits, tls)
        self._decoders = decoders or ImageDecoders()

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
        return await self._store(partial(_copy_image_body, request))

    async def _store(self, copy: Callable[[Write], Awaitable[None]]) -> StoredImage:
        with self.files.draft() as draft:
            await copy(partial(self._append, draft))
            await run_sync(draft.sync)
            info = await _valid(self._decoders.check(draft.path))
            name = self.files.new_name(SUFFIXES.get(info.format, f".{info.format}"))
            draft.keep(name)  # nothing is awaited from here on: who is cancelled later knows the name
            return StoredImage(name, info.width, info.height, info.mime, draft.size_bytes, fresh=True)

    async def _append(self, draft: PendingFile, piece: bytes) -> None:
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
                raise invalid_field("file", "The form has no file in its field `file`.")
            while piece := await file.read(PIECE_BYTES):
                await write(piece)
        finally:
            await form.close()

    async def _form(self, request: Request) -> FormData:
        try:
            return await MultiPartParser(request.headers, self._counted(request), max_files=1, max_fields=20).parse()
        except MultiPartException as error:
            raise invalid_field("file", error.message) from error

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


async def _copy_image_body(request: Request, write: Write) -> None:
    async for piece in request.stream():
        await write(piece)


ClipKind = Literal["video", "audio"]

LIMITS = Limits(max_bytes=200 * 2**20, fetch_s=120.0, noun="file")
DECODERS = 2  # at once
CHECKS: Mapping[str, Callable[[Path], VideoInfo | AudioInfo]] = {
    "video": check_video_decodes,
    "audio": check_audio_decodes,
}


@dataclass(frozen=True)
class StoredClip:
    """`fresh`: stored for this request, to be deleted if the request fails."""

    name: str
    info: VideoInfo | AudioInfo
    fresh: bool

    @property
    def duration_s(self) -> float:
        return self.info.duration_s


class VideoInputs:
    """The door for videos and audio. What it raises is in `server.errors`."""

    def __init__(
        self,
        files: FileStore,
        guard: AddressGuard,
        *,
        offline: bool,
        limits: Limits = LIMITS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.files, self.offline, self.limits = files, offline, limits
        tls = tls or httpx.create_ssl_context()  # one for both: each takes 20 ms to make
        self._fetchers = {
            kind: Fetcher(guard, replace(limits, noun=kind, accept=f"{kind}/*"), tls) for kind in ("video", "audio")
        }
        self._decoding = anyio.CapacityLimiter(DECODERS)

    async def take(self, kind: ClipKind, url: str, own_bases: Sequence[str]) -> StoredClip:
        """The video or audio at `url`. `own_bases` are the addresses under which this server's files are known."""
        if name := self.files.name_in(url, own_bases):
            return StoredClip(name, await self._own(kind, name), fresh=False)
        return await self._store(kind, partial(self._copy, kind, url))

    async def upload(self, kind: ClipKind, request: Request) -> StoredClip:
        """What the body holds."""
        return await self._store(kind, partial(_copy_clip_body, request))

    async def _store(self, kind: ClipKind, copy: Callable[[Write], Awaitable[None]]) -> StoredClip:
        with self.files.draft() as draft:
            await copy(partial(self._append, draft))
            await run_sync(draft.sync)
            info = await self._inspect(kind, draft.path)
            draft.keep(name := self.files.new_name(info.suffix))
            return StoredClip(name, info, fresh=True)

    async def _copy(self, kind: ClipKind, url: str, write: Write) -> None:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            content = await run_sync(decode_data_url, url)
            for start in range(0, len(content), PIECE_BYTES):
                await write(content[start : start + PIECE_BYTES])
        elif scheme not in ("http", "https"):
            raise AddressRefused(f"Take the {kind} from an https:, http: or data: URL, or one of this server's files.")
        elif self.offline:
            raise AddressRefused(f"This server is offline and fetches nothing: send the {kind} as a data: URL.")
        else:
            await self._fetchers[kind].copy(url, write)

    async def _append(self, draft: PendingFile, piece: bytes) -> None:
        self.limits.check_size(draft.size_bytes + len(piece))
        await run_sync(draft.write, piece)

    async def _own(self, kind: ClipKind, name: str) -> VideoInfo | AudioInfo:
        path = self.files.path(name)
        if not await run_sync(path.exists):
            raise MediaUnreachable("There is no such file on this server, or no longer.")
        return await self._inspect(kind, path)

    async def _inspect(self, kind: ClipKind, path: Path) -> VideoInfo | AudioInfo:
        """What the file holds, once it was decoded to its end."""
        try:
            return await run_sync(CHECKS[kind], path, limiter=self._decoding)
        except InvalidInput as error:
            raise InvalidMedia(str(error)) from error


async def _copy_clip_body(request: Request, write: Write) -> None:
    async for piece in request.stream():
        await write(piece)
