"""Weights from this machine's own disks: a folder in diffusers layout, a single file, or another weights folder."""

from pathlib import Path

from pipelines.catalog.catalog import Model
from pipelines.weights.errors import NotFound
from pipelines.weights.files import File, Listing, OnBytes, choose, inside
from pipelines.weights.formats import refuse_pickle_name
from pipelines.weights.lock import Entry, size_of

CHUNK_BYTES = 1 << 24


class Folder:
    """Copies. A single file must have the hash that `weights.toml` gives, if it gives one."""

    def __init__(self, model: Model, path: Path) -> None:
        self.paths = find_files(model, path)
        self.pinned = model.weights if model.weights and len(self.paths) == 1 else None

    def listing(self) -> Listing:
        return Listing(tuple(self.as_file(name, path.stat().st_size) for name, path in self.paths.items()))

    def as_file(self, name: str, size_bytes: int) -> File:
        return File(name, size_bytes, self.pinned.sha256, self.pinned.md5) if self.pinned else File(name, size_bytes)

    def fetch(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        copy_rest(self.paths[file.name], part, on_bytes)


class Installation:
    """Copies what another machine has installed: every file must be what that machine's lock says."""

    def __init__(self, root: Path, entry: Entry) -> None:
        self.path, self.entry = entry.path(root), entry

    def listing(self) -> Listing:
        files = [File(name, record.size_bytes, record.sha256) for name, record in self.entry.files.items()]
        for file in files:
            if not inside(file.name) or size_of(self.path / file.name) != file.size_bytes:
                raise NotFound(f"{self.path / file.name} is not there whole, though the weights.lock there names it.")
        return Listing(tuple(files), self.entry.commit)

    def fetch(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        copy_rest(self.path / file.name, part, on_bytes)


def copy_rest(path: Path, part: Path, on_bytes: OnBytes) -> None:
    with path.open("rb") as source, part.open("ab") as out:
        source.seek(out.tell())
        while chunk := source.read(CHUNK_BYTES):
            out.write(chunk)
            on_bytes(len(chunk))


def find_files(model: Model, path: Path) -> dict[str, Path]:
    """The files worth having, by their names in the model's folder. A single file takes the model's name."""
    if path.is_file():
        refuse_pickle_name(path.name)
        name = model.id + path.suffix
        return {choose([name], str(path), (name,) if model.quantisation == "gguf" else ())[0]: path}
    if not path.is_dir():
        raise NotFound(f"There is no {path}.")
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    named = model.weights.files if model.quantisation == "gguf" and model.weights else ()
    return {name: found[name] for name in choose(found, str(path), named)}
