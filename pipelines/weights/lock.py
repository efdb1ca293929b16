"""`weights.lock`: what is installed, where it came from, and what every file should be. JSON, replaced as a whole."""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.catalog.catalog import Source
from pipelines.weights.errors import PullError

NAME = "weights.lock"
PARTIAL = ".partial"
"""The folder, beside the models', of what is still coming in."""

IDENTITY = ("kind", "repo", "revision", "url", "sha256", "md5", "path")


@dataclass(frozen=True)
class FileRecord:
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One installed model. `folder` is relative to the weights folder, or absolute for weights used in place."""

    folder: str
    source: Mapping[str, Any]
    commit: str | None
    licence: str
    pulled_at: str
    files: Mapping[str, FileRecord]

    def path(self, root: Path) -> Path:
        return root / self.folder

    def intact(self, root: Path) -> bool:
        """Every file is there, with its size. Quick: nothing is read."""
        return all(size_of(self.path(root) / name) == record.size_bytes for name, record in self.files.items())


@dataclass(frozen=True)
class Lock:
    """`accepted` is when each model's licence was accepted here."""

    models: Mapping[str, Entry] = field(default_factory=dict)
    accepted: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> "Lock":
        """Empty where there is none."""
        try:
            values = json.loads((root / NAME).read_text("utf-8"))
            return cls({name: read_entry(entry) for name, entry in values["models"].items()}, values["accepted"])
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PullError(f"{root / NAME} cannot be read ({error!r}). Delete it and pull again.") from error


def read_entry(values: dict[str, Any]) -> Entry:
    return Entry(**{**values, "files": {name: FileRecord(**record) for name, record in values["files"].items()}})


def update(root: Path, change: Callable[[Lock], Lock]) -> None:
    """Reads, changes and replaces the lock, one process at a time."""
    with locked(root / PARTIAL / "weights.flock"):
        text = json.dumps(asdict(change(Lock.read(root))), indent=1, sort_keys=True)
        incoming = root / PARTIAL / NAME
        incoming.write_text(text + "\n", "utf-8")
        incoming.replace(root / NAME)


def record(root: Path, model: str, entry: Entry) -> None:
    update(root, lambda lock: replace(lock, models={**lock.models, model: entry}))


def record_acceptance(root: Path, model: str, accepted_at: str) -> None:
    update(root, lambda lock: replace(lock, accepted={model: accepted_at, **lock.accepted}))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process is inside with this `path`. A process that dies lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def described(source: Source) -> dict[str, Any]:
    """A source as the lock tells it: the fields that are set, in JSON's own types."""
    return json.loads(json.dumps({key: value for key, value in asdict(source).items() if value}))


def same_source(recorded: Mapping[str, Any], source: Source) -> bool:
    """Whether both name the same weights; how they are fetched and chosen may have changed since."""
    named = described(source)
    return all(recorded.get(key) == named.get(key) for key in IDENTITY)


def size_of(path: Path) -> int | None:
    """None where there is no such file."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
