"""Reads every installed file again and tells which are not what `weights.lock` says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.weights.files import digest
from pipelines.weights.lock import FileRecord, Lock, size_of


@dataclass(frozen=True)
class Problem:
    model: str
    file: Path
    what: Literal["missing", "size", "hash"]


def verify(root: Path, on_file: Callable[[str, Path], None] = lambda _model, _file: None) -> list[Problem]:
    """Empty when all is well. `on_file` is told each file before it is read."""
    return list(find_problems(root, on_file))


def find_problems(root: Path, on_file: Callable[[str, Path], None]) -> Iterator[Problem]:
    for model, entry in Lock.read(root).models.items():
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
