"""Verifies installed files against `weights.lock`, and demo weights against their `SHA256SUMS` (coreutils' format)."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.catalog.catalog import Catalog
from pipelines.weights.errors import Damaged
from pipelines.weights.files import digest, inside
from pipelines.weights.lock import Entry, FileRecord, Lock, size_of

SUMS_NAME = "SHA256SUMS"
SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def read_sums(folder: Path) -> Mapping[str, str]:
    """Each file's sha256, by its name in the folder. Raises `Damaged`."""
    try:
        lines = [SUMS_LINE.fullmatch(line) for line in (folder / SUMS_NAME).read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise Damaged(f"{folder} has no {SUMS_NAME}; scripts/sums writes it.") from None
    if not lines or not all(line and inside(line[2]) for line in lines):
        raise Damaged(f"{folder / SUMS_NAME} is not what sha256sum writes.")
    return {line[2]: line[1] for line in lines if line}


def read_entry(folder: Path) -> Entry | None:
    """The folder as if it was installed; None where there is no such folder. Raises `Damaged` if a file is missing."""
    if not folder.is_dir():
        return None
    files = {}
    for name, sha256 in read_sums(folder).items():
        size_bytes = size_of(folder / name)
        if size_bytes is None:
            raise Damaged(f"{folder / name} is missing.")
        files[name] = FileRecord(size_bytes, sha256)
    return Entry(str(folder), {}, None, "", "", files)


OnFile = Callable[[str, Path], None]


@dataclass(frozen=True)
class Problem:
    model: str
    file: Path
    what: Literal["missing", "size", "hash"]


def verify(root: Path, on_file: OnFile = lambda _model, _file: None) -> list[Problem]:
    """Empty when all is well. `on_file` is told each file before it is read."""
    return list(find_problems(root, on_file))


def verify_demo(catalog: Catalog, on_file: OnFile) -> list[Problem]:
    """The same for the demo weights that there are. Raises `Damaged` where it is not known what they should be."""
    demos = [model.demo for model in catalog.models.values() if model.demo]
    paths = {demo.weights.path: f"demo {demo.family}" for demo in demos if demo.weights}
    entries = {name: read_entry(Path(path)) for path, name in paths.items()}
    return [problem for name, entry in entries.items() if entry
            for problem in problems_of(name, entry, Path(), on_file)]  # fmt: skip


def find_problems(root: Path, on_file: OnFile) -> Iterator[Problem]:
    for model, entry in Lock.read(root).models.items():
        yield from problems_of(model, entry, root, on_file)


def problems_of(model: str, entry: Entry, root: Path, on_file: OnFile) -> Iterator[Problem]:
    for name, record in entry.files.items():
        path = entry.path(root) / name
        on_file(model, path)
        if what := problem_of(path, record):
            yield Problem(model, path, what)


def problem_of(path: Path, record: FileRecord) -> Literal["missing", "size", "hash"] | None:
    size_bytes = size_of(path)
    if size_bytes is None:
        return "missing"
    if size_bytes != record.size_bytes:
        return "size"
    return None if digest(path, "sha256") == record.sha256 else "hash"
