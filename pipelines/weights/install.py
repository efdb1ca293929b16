"""Puts a model's files in place: all of them, checked, in one step; or none, and the next try goes on from there."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.catalog.catalog import Model
from pipelines.weights.errors import NotEnoughSpace, PullError
from pipelines.weights.files import File, Listing, Origin, check_hashes, digest, size_text
from pipelines.weights.formats import check_content
from pipelines.weights.lock import PARTIAL, Entry, FileRecord, Lock, now, record, size_of


@dataclass(frozen=True)
class Progress:
    """How far a model's files are. `total_bytes` is None where a source does not tell sizes."""

    model: str
    file: str
    done_bytes: int
    total_bytes: int | None


OnProgress = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    pass


def install(model: Model, root: Path, origin: Origin, source: dict[str, Any], on_progress: OnProgress) -> Entry:
    """Stages every file, then puts them in place together and records them."""
    listing = origin.listing()
    staging = root / PARTIAL / f"{model.id}@{listing.fingerprint}"
    staging.mkdir(parents=True, exist_ok=True)
    link_existing_files(listing, staging, root)
    check_space(model, listing, staging)
    meter = DownloadProgress(model, listing, staging, on_progress)
    files = {file.name: stage(file, staging, origin, meter) for file in listing.files}
    entry = Entry(model.id, source, listing.commit, model.licence, now(), files)
    swap(staging, root / model.id)
    record(root, model.id, entry)
    delete_partials(model, root)
    return entry


def link_existing_files(listing: Listing, staging: Path, root: Path) -> None:
    """Files with a hash that another model, or an older version, has already: Flux's encoders are fetched once.

    Not those used in place: they are somebody else's to change.
    """
    here = {
        (record.sha256, record.size_bytes): entry.path(root) / name
        for entry in Lock.read(root).models.values()
        if not Path(entry.folder).is_absolute()
        for name, record in entry.files.items()
    }
    for file in listing.files:
        same = here.get((file.sha256, file.size_bytes or -1))
        if same and same.exists() and not (staging / file.name).exists() and digest(same, "sha256") == file.sha256:
            link_or_copy(same, staging / file.name)


def link_or_copy(same: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(same, target)
    except OSError:  # another disk, or one that knows no links
        part = part_of(target)
        shutil.copyfile(same, part)
        part.replace(target)


def check_space(model: Model, listing: Listing, staging: Path) -> None:
    needed_bytes = sum(file.size_bytes or 0 for file in listing.files) - sum(staged_bytes(listing, staging))
    free_bytes = shutil.disk_usage(staging).free
    if needed_bytes > free_bytes:
        raise NotEnoughSpace(
            f"{model.id} needs {size_text(needed_bytes)} more in {staging.parent.parent}, "
            f"where {size_text(free_bytes)} are free. Free {size_text(needed_bytes - free_bytes)}, "
            "or name a folder on a larger disk with --data."
        )


def staged_bytes(listing: Listing, staging: Path) -> list[int]:
    """What of each file is staged already, whole or in part."""
    paths = (staging / file.name for file in listing.files)
    return [size_of(path) or size_of(part_of(path)) or 0 for path in paths]


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


class DownloadProgress:
    """Adds up the bytes of all files and tells how far the model is."""

    def __init__(self, model: Model, listing: Listing, staging: Path, on_progress: OnProgress) -> None:
        self.model, self.on_progress = model, on_progress
        sizes = [file.size_bytes for file in listing.files]
        self.total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        self.done_bytes = sum(staged_bytes(listing, staging))

    def add(self, file: File, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        self.on_progress(Progress(self.model.id, file.name, self.done_bytes, self.total_bytes))


def stage(file: File, staging: Path, origin: Origin, meter: DownloadProgress) -> FileRecord:
    """A file has its own name only once it is whole and checked; until then it is a `.part`."""
    target = staging / file.name
    if target.exists():
        return FileRecord(target.stat().st_size, file.sha256 or digest(target, "sha256"))
    part = part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    meter.add(file, 0)
    origin.fetch(file, part, lambda size_bytes: meter.add(file, size_bytes))
    sha256 = check_or_throw_away(part, file)
    part.replace(target)
    return FileRecord(target.stat().st_size, sha256)


def check_or_throw_away(part: Path, file: File) -> str:
    try:
        check_content(part, file.name)
        return check_hashes(part, file)
    except PullError:
        part.unlink()
        raise


def swap(staging: Path, folder: Path) -> None:
    """Puts the staged folder in place. A process that has the old files open keeps them."""
    old = staging.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def delete_partials(model: Model, root: Path) -> None:
    """Parts of other versions, which nobody will complete."""
    for leftover in (root / PARTIAL).glob(f"{model.id}@*"):
        shutil.rmtree(leftover, ignore_errors=True)
