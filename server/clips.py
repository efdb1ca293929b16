"""Input videos and audio by URL, made stored files: counted, decoded once, kept; or refused, and nothing left."""

import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import httpx
from anyio.to_thread import run_sync
from starlette.requests import Request

from pipelines.base import InvalidInput
from pipelines.sound import AudioInfo, check_audio_decodes
from pipelines.video import VideoInfo, check_video_decodes
from server.addresses import Guard
from server.errors import AddressRefused, InvalidMedia, MediaUnreachable
from server.fetching import PIECE_BYTES, Fetcher, Limits, Write
from server.media import decode_data_url
from server.outputs import Draft, Files

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


class Clips:
    """The door for videos and audio. What it raises is in `server.errors`."""

    def __init__(
        self, files: Files, guard: Guard, *, offline: bool, limits: Limits = LIMITS, tls: ssl.SSLContext | None = None
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
        return await self._store(kind, partial(_copy_body, request))

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

    async def _append(self, draft: Draft, piece: bytes) -> None:
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


async def _copy_body(request: Request, write: Write) -> None:
    async for piece in request.stream():
        await write(piece)
