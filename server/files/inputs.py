"""Input files: images, video and audio from a URL or an upload, checked by decoding once and stored.

An input that is refused leaves nothing behind.
"""

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

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

FORM_BYTES = 2**16
"""What a multipart form may add to the size of its file."""
MAX_MEDIA_BYTES = 200 * 2**20
MEDIA_FETCH_S = 120.0
MEDIA_DECODERS = 2
"""Videos and audio decoded at once, in threads: FFmpeg releases the interpreter's lock. Images have processes."""

Info = TypeVar("Info", ImageInfo, VideoInfo, AudioInfo)


@dataclass(frozen=True)
class MediaKind(Generic[Info]):
    """What a file may be: `inspect` reads a stored file's facts, and raises InvalidInput for another kind."""

    noun: str
    limits: Limits
    inspect: Callable[[Path], Info]


IMAGE = MediaKind("image", Limits(), probe)
VIDEO = MediaKind(
    "video", Limits(MAX_MEDIA_BYTES, fetch_s=MEDIA_FETCH_S, noun="video", accept="video/*"), check_video_decodes
)
AUDIO = MediaKind(
    "audio", Limits(MAX_MEDIA_BYTES, fetch_s=MEDIA_FETCH_S, noun="audio", accept="audio/*"), check_audio_decodes
)


@dataclass(frozen=True)
class StoredFile(Generic[Info]):
    """A checked input file. `is_new`: stored for this request, and deleted if the request fails."""

    name: str
    info: Info
    size_bytes: int
    is_new: bool


StoredImage = StoredFile[ImageInfo]
StoredVideo = StoredFile[VideoInfo]
StoredAudio = StoredFile[AudioInfo]


class InputFiles:
    """Takes input files from callers. `limits` are those of images; what is raised is in `server.errors`."""

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
        self.files, self.offline = files, offline
        guard, tls = AddressGuard(allowed_networks, resolve), tls or httpx.create_ssl_context()
        self._limits = {kind.noun: kind.limits for kind in (VIDEO, AUDIO)} | {IMAGE.noun: limits or IMAGE.limits}
        self._fetchers = {noun: Fetcher(guard, each, tls) for noun, each in self._limits.items()}
        self._decoders = decoders or ImageDecoders()
        self._media_decoding = anyio.CapacityLimiter(MEDIA_DECODERS)

    async def from_url(self, kind: MediaKind[Info], url: str, own_base_urls: Sequence[str]) -> StoredFile[Info]:
        """The file at `url`. `own_base_urls` are the addresses under which this server's own files are known."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await self._store(kind, partial(self._copy_data_url, kind, url))
        if name := self.files.name_in(url, own_base_urls):
            return await self._existing(kind, name)
        if scheme not in ("http", "https"):
            raise AddressRefused(
                f"Give the {kind.noun} as an https:, http: or data: URL, or as one of this server's files."
            )
        if self.offline:
            raise AddressRefused(
                f"This server is offline and fetches nothing: send a data: URL, or upload the {kind.noun}."
            )
        return await self._store(kind, partial(self._fetchers[kind.noun].copy, url))

    async def from_upload(self, kind: MediaKind[Info], request: Request) -> StoredFile[Info]:
        """The file in the body: a form's field `file`, or the body itself, whatever its content type."""
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await self._store(kind, partial(self._copy_form, self._limits[kind.noun], request))
        return await self._store(kind, partial(_copy_body, request))

    async def _store(self, kind: MediaKind[Info], copy: Callable[[Write], Awaitable[None]]) -> StoredFile[Info]:
        with self.files.draft() as pending:
            await copy(partial(self._append, self._limits[kind.noun], pending))
            await run_sync(pending.sync)
            info = await self._check(kind, pending.path)
            pending.keep(name := self.files.new_name(info.suffix))
            # nothing is awaited from here on: a request that is cancelled later knows the name, and deletes it
            return StoredFile(name, info, pending.size_bytes, is_new=True)

    async def _existing(self, kind: MediaKind[Info], name: str) -> StoredFile[Info]:
        """No copy; an image is not decoded again: it was made here, or decoded when it was stored."""
        path = self.files.path(name)
        try:
            info = await _valid(run_sync(kind.inspect, path, limiter=self._media_decoding))
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            raise MediaUnreachable("There is no such file on this server, or no longer.") from None
        return StoredFile(name, info, size_bytes, is_new=False)

    async def _check(self, kind: MediaKind[Info], path: Path) -> Info:
        """Decode the whole file. Images are decoded in sandboxed processes."""
        if kind.noun == IMAGE.noun:
            return cast(Info, await _valid(self._decoders.check(path)))
        return await _valid(run_sync(kind.inspect, path, limiter=self._media_decoding))

    async def _append(self, limits: Limits, pending: PendingFile, piece: bytes) -> None:
        limits.check_size(pending.size_bytes + len(piece))
        await run_sync(pending.write, piece)

    async def _copy_data_url(self, kind: MediaKind[Any], url: str, write: Write) -> None:
        self._limits[kind.noun].check_size(len(url) // 3 - FORM_BYTES)  # at most three characters a byte
        content = await run_sync(decode_data_url, url)
        for start in range(0, len(content), PIECE_BYTES):
            await write(content[start : start + PIECE_BYTES])

    async def _copy_form(self, limits: Limits, request: Request, write: Write) -> None:
        form = await self._form(limits, request)
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise invalid_field("file", "The form has no file in its field `file`.")
            while piece := await file.read(PIECE_BYTES):
                await write(piece)
        finally:
            await form.close()

    async def _form(self, limits: Limits, request: Request) -> FormData:
        counted = self._counted(limits, request)
        try:
            return await MultiPartParser(request.headers, counted, max_files=1, max_fields=20).parse()
        except MultiPartException as error:
            raise invalid_field("file", error.message) from error

    async def _counted(self, limits: Limits, request: Request) -> AsyncGenerator[bytes, None]:
        size_bytes = 0
        async for piece in request.stream():
            size_bytes += len(piece)
            limits.check_size(size_bytes - FORM_BYTES)
            yield piece


async def _copy_body(request: Request, write: Write) -> None:
    async for piece in request.stream():
        await write(piece)


async def _valid(info: Awaitable[Info]) -> Info:
    try:
        return await info
    except InvalidInput as error:
        raise InvalidMedia(str(error)) from error
