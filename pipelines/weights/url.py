"""Weights from a plain URL."""

import time
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx

from pipelines.catalog.catalog import Model, Source
from pipelines.weights.errors import NotFound, Unreachable
from pipelines.weights.files import File, Listing, OnBytes
from pipelines.weights.formats import refuse_pickle_name

ATTEMPTS = 3
RETRY_AFTER_S = 1.0
TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 20
PLAIN = {"Accept-Encoding": "identity"}
"""Or a range would count compressed bytes."""


class Url:
    def __init__(self, model: Model, source: Source) -> None:
        self.model, self.source = model, source

    def listing(self) -> Listing:
        name = PurePosixPath(urlsplit(self.source.url).path).name
        refuse_pickle_name(name)
        size_bytes = self.source.size_bytes or self.told_size()
        return Listing((File(self.model.id + Path(name).suffix, size_bytes, self.source.sha256, self.source.md5),))

    def told_size(self) -> int | None:
        """Some servers do not tell; then the disk is not checked beforehand."""
        try:
            answer = httpx.head(self.source.url, headers=PLAIN, follow_redirects=True, timeout=TIMEOUT_S)
            length = answer.raise_for_status().headers.get("Content-Length")
        except httpx.HTTPStatusError:
            return None
        except httpx.TransportError as error:
            raise self.broken(error) from error
        return int(length) if length else None

    def fetch(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.fetch_rest(file, part, on_bytes)
                break
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise NotFound(f"{self.source.url} answered {error.response.status_code}.") from error
                raise self.broken(error) from error
            except httpx.TransportError as error:
                if attempt == ATTEMPTS:
                    raise self.broken(error) from error
                time.sleep(RETRY_AFTER_S)

    def fetch_rest(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        with part.open("ab") as out:
            have = out.tell()
            if have and have == file.size_bytes:
                return
            headers = PLAIN | ({"Range": f"bytes={have}-"} if have else {})
            with httpx.stream(
                "GET", self.source.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S
            ) as answer:
                if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return  # there is no more of it; the hash tells whether it is right
                answer.raise_for_status()
                if have and answer.status_code != httpx.codes.PARTIAL_CONTENT:
                    on_bytes(-have)
                    out.truncate(0)
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    out.write(chunk)
                    on_bytes(len(chunk))

    def broken(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"{self.source.url} did not answer, or broke off ({error}). Pull again: it goes on from where it stopped. "
            "Without a network, use plantain import."
        )
