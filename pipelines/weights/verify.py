"""Reads every installed file again and tells which are not what `weights.lock` says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.catalog import Catalog
from pipelines.weights.files import digest
from pipelines.weights.lock import Entry, FileRecord, Lock, size_of
from pipelines.weights.sums import read_entry

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
