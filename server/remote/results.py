"""fal's answer made a file of ours: fetched at once, decoded once, kept under the job's name."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio.to_thread import run_sync

from pipelines.base import InvalidInput
from pipelines.media.images import check_decodes
from pipelines.media.video import check_video_decodes
from server.errors import MediaUnreachable, PlantainError
from server.files.fetch import AddressGuard, Fetcher, Limits, decode_data_url
from server.files.store import FileStore, PendingFile
from server.jobs.job import Job
from server.remote.errors import ContentRefused, OutputLost

LIMITS = Limits(max_bytes=2**30, fetch_s=600.0, noun="output", accept="*/*")
SUFFIXES = {"jpeg": ".jpg"}
DECODERS = 2
TRIES = 3
OUTPUT_KEYS = {"video": ("video", "videos", "file", "files")}
IMAGE_KEYS = ("images", "image", "file", "files")


@dataclass(frozen=True)
class RemoteOutput:
    """`output` has what the documented answer needs: width and height, a seed, a video's duration, a URL of fal's."""

    name: str
    output: Mapping[str, Any]


class ResultDownloader:
    """Fetches through the same guard as callers' URLs: fal's answer is no more to be trusted."""

    def __init__(
        self, files: FileStore, guard: AddressGuard, tls: ssl.SSLContext, pass_through_urls: bool, retry_s: float
    ) -> None:
        self.files, self.pass_through_urls, self.retry_s = files, pass_through_urls, retry_s
        self._fetcher = Fetcher(guard, LIMITS, tls)
        self._decoding = anyio.CapacityLimiter(DECODERS)

    async def collect(self, job: Job, answer: Mapping[str, Any]) -> RemoteOutput:
        """Raises ContentRefused, or OutputLost."""
        check_safety_flags(answer)
        url = output_url(job.kind, answer)
        with self.files.draft() as draft:
            await self._copy(url, draft)
            await run_sync(draft.sync)
            suffix, facts = await self._inspect(job.kind, draft.path)
            draft.keep(name := str(Path(job.output_name).with_suffix(suffix)))
        if (seed := answer.get("seed")) is not None and type(seed) is int:
            facts["seed"] = seed
        if self.pass_through_urls and not url.startswith("data:"):
            facts["url"] = url
        return RemoteOutput(name, facts)

    async def _copy(self, url: str, draft: PendingFile) -> None:
        """A few times: what fal made was paid for."""
        for left in reversed(range(TRIES)):
            try:
                return await self._copy_once(url, draft)
            except MediaUnreachable as error:
                if not left or draft.size_bytes:
                    raise OutputLost(f"fal.ai's output could not be fetched. {error.message}") from error
                await anyio.sleep(self.retry_s)
            except PlantainError as error:
                raise OutputLost(f"fal.ai's output could not be fetched. {error.message}") from error
        return None

    async def _copy_once(self, url: str, draft: PendingFile) -> None:
        if url.startswith("data:"):
            await run_sync(draft.write, await run_sync(decode_data_url, url))
        else:
            await self._fetcher.copy(url, partial(_append, draft))

    async def _inspect(self, kind: str, path: Path) -> tuple[str, dict[str, Any]]:
        """(suffix, facts): the file says what it is, whatever fal said."""
        try:
            if kind == "video":
                clip = await run_sync(check_video_decodes, path, limiter=self._decoding)
                return clip.suffix, {"width": clip.width, "height": clip.height, "duration": round(clip.duration_s, 3)}
            image = await run_sync(check_decodes, path, limiter=self._decoding)
        except InvalidInput as error:
            raise OutputLost(f"fal.ai's output cannot be used. {error}") from error
        return SUFFIXES.get(image.format, f".{image.format}"), {"width": image.width, "height": image.height}


def output_url(kind: str, answer: Mapping[str, Any]) -> str:
    """The first file of the answer, which has it as a list, an object or a bare URL, under a name by model."""
    for key in OUTPUT_KEYS.get(kind, IMAGE_KEYS):
        found = answer.get(key)
        found = found[0] if isinstance(found, list) and found else found
        url = found.get("url") if isinstance(found, Mapping) else found
        if isinstance(url, str) and url:
            return url
    raise OutputLost(f"fal.ai answered without an output: it has {', '.join(map(str, answer)) or 'nothing'}.")


def check_safety_flags(answer: Mapping[str, Any]) -> None:
    """A picture that the safety checker made black is a refusal, not an output."""
    flags = answer.get("has_nsfw_concepts")
    if isinstance(flags, list) and flags[:1] == [True]:
        raise ContentRefused("The safety checker at fal.ai refused the picture.")


async def _append(draft: PendingFile, piece: bytes) -> None:
    await run_sync(draft.write, piece)
