"""The folder of files that callers are given URLs of: outputs, and input images. A name is the only key to a file."""

import errno
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from starlette.responses import FileResponse

from server.errors import NotFound, StorageFull

MIME_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif", ".bmp": "image/bmp",
    ".tiff": "image/tiff", ".avif": "image/avif", ".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime",
    ".mp3": "audio/mpeg", ".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".m4a": "audio/mp4",
}  # fmt: skip
NAME = re.compile(r"[0-9a-f]{48}(\.[a-z0-9]+)")
HEADERS = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}
DEFAULT_PORTS = {"http": 80, "https": 443}


class PendingFile:
    """A file being written. It gets its name with `keep`, when it is known to be good."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.size_bytes = 0

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.size_bytes += len(chunk)

    def sync(self) -> None:
        """All that was written is on disk, for others to read by `path`."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, name: str) -> None:
        """Call `sync` before: this only gives the name, at once, so that nothing can come between."""
        self.path.replace(self.path.with_name(name))


class FileStore:
    """Written once, never changed. Whatever starts with a dot is half-written and has no URL."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def new_name(self, suffix: str) -> str:
        """192 random bits in hex: safe in URLs, shells and file systems, even those that ignore case."""
        return well_formed(secrets.token_hex(24) + suffix)

    def staging_path(self, name: str | None = None) -> Path:
        """The absolute path at which a worker on this host reads or writes a file; the folder of all without a name."""
        return (self.path(name) if name else self.root).absolute()

    def path(self, name: str) -> Path:
        """Where the file is, or would be. Raises `NotFound` for what is not a name of this folder."""
        return self.root / well_formed(name)

    def url(self, name: str, base_url: str) -> str:
        return f"{base_url.rstrip('/')}/files/{well_formed(name)}"

    def name_in(self, url: str, bases: Iterable[str]) -> str | None:
        """The name, if this is a URL of one of this folder's files: a bare `/files/name`, or one at one of `bases`."""
        folder, _, name = url.partition("?")[0].partition("#")[0].rpartition("/")
        ours = {"/files", *(_canonical(base.rstrip("/") + "/files") for base in bases)}
        return name if _canonical(folder) in ours and is_well_formed(name) else None

    @contextmanager
    def draft(self) -> Iterator[PendingFile]:
        """A file to be written. Unless it is kept, nothing of it remains."""
        path = self.root / f".{secrets.token_hex(24)}.part"
        try:
            with storage_errors(), path.open("wb") as file:
                yield PendingFile(path, file)
        finally:
            path.unlink(missing_ok=True)

    def write(self, content: bytes | IO[bytes], suffix: str) -> str:
        """Store the whole of `content`, or nothing; its new name."""
        with self.draft() as draft:
            for chunk in [content] if isinstance(content, bytes) else iter(lambda: content.read(2**20), b""):
                draft.write(chunk)
            draft.sync()
            draft.keep(name := self.new_name(suffix))
        return name

    def delete(self, name: str) -> None:
        """A video's poster goes with it."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        if path.suffix == ".mp4":
            path.with_suffix(".jpg").unlink(missing_ok=True)

    def sweep(self, known: set[str], older_than_s: float) -> list[str]:
        """Delete what nobody knows of and what was left half-written; the names that went."""
        oldest_at = time.time() - older_than_s
        stems = {Path(name).stem for name in known}  # a video and its poster differ in the suffix only
        strays = [path for path in self.root.iterdir() if path.stem not in stems and _is_stray(path, oldest_at)]
        for path in strays:
            path.unlink(missing_ok=True)
        return [path.name for path in strays]

    def response(self, name: str) -> FileResponse:
        """The file, or the ranges of it that were asked for. Raises `NotFound`."""
        path = self.path(name)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise NotFound("There is no such file.") from None
        return FileResponse(
            path,
            headers=HEADERS,
            media_type=MIME_TYPES[path.suffix],
            filename=name,
            stat_result=stat,
            content_disposition_type="inline",
        )


def is_well_formed(name: str) -> bool:
    match = NAME.fullmatch(name)
    return match is not None and match[1] in MIME_TYPES


def well_formed(name: str) -> str:
    if not is_well_formed(name):
        raise NotFound("There is no such file.")
    return name


@contextmanager
def storage_errors() -> Iterator[None]:
    """A full disk, or a used-up quota, as the error that callers are told."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The server's disk is full.") from error
        raise


def _canonical(url: str) -> str:
    """Scheme and host in lower case, the scheme's own port left out."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ""
    if not parts.netloc:
        return url
    host = parts.netloc.lower()
    if port is not None and port == DEFAULT_PORTS.get(parts.scheme):
        host = host.removesuffix(f":{port}")
    return f"{parts.scheme}://{host}{parts.path}"


def _is_stray(path: Path, oldest_at: float) -> bool:
    """Old, and named as this server names its files: anything else in the folder is not ours to delete."""
    if not is_well_formed(path.name) and path.suffix != ".part":
        return False
    try:
        return path.stat().st_mtime < oldest_at
    except FileNotFoundError:  # just kept, or deleted
        return False
