"""Words that the sources share: a file to fetch, a listing of them, and which names are wanted at all."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipelines.weights.errors import HashMismatch, NothingToPull, PickleRefused
from pipelines.weights.formats import GGUF_SUFFIX, PICKLES, WEIGHTS

KEPT = (".safetensors", ".onnx", ".json", ".txt", ".model")
"""Weights, configurations and tokenizers. A GGUF file only where it is named: many repositories hold a dozen."""

VARIANT = re.compile(r"\.(fp16|bf16|fp8|non_ema)[.-]")
"""Marks the same weights once more, in another precision."""

OnBytes = Callable[[int], None]
"""Told how many bytes more are here; fewer than none when a file is begun again."""


@dataclass(frozen=True)
class File:
    """One file to fetch, by its name in the model's folder. What is not known beforehand is None or empty."""

    name: str
    size_bytes: int | None = None
    sha256: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Listing:
    files: tuple[File, ...]
    commit: str | None = None

    @property
    def fingerprint(self) -> str:
        """Different for whatever differs, so that parts of two versions never meet in one folder."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


class Origin(Protocol):
    """A place that weights come from."""

    def listing(self) -> Listing: ...

    def fetch(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        """Completes `part`, going on from what it holds already."""
        ...


def choose(names: Iterable[str], origin: str, files: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[str]:
    """The names worth having. Raises if there are no weights among them."""
    names = sorted(names)
    chosen = [
        name
        for name in names
        if wanted(name, files) and (not files or matches(name, files)) and not matches(name, skip)
    ]
    if any(name.endswith(WEIGHTS) for name in chosen):
        return chosen
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        raise PickleRefused(f"{origin} has only pickles ({pickles[0]}), which can run any code when loaded.")
    raise NothingToPull(f"{origin} has no .safetensors or .onnx file.")


def wanted(name: str, files: tuple[str, ...] = ()) -> bool:
    path = PurePosixPath(name)
    if path.suffix == GGUF_SUFFIX:
        return inside(name) and name in files
    return inside(name) and path.suffix in KEPT and not VARIANT.search(path.name)


def inside(name: str) -> bool:
    """Whether a name stays in the model's folder. Names come from other machines."""
    path = PurePosixPath(name)
    return not path.is_absolute() and not any(part.startswith(".") for part in path.parts)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_hashes(path: Path, file: File) -> str:
    """The sha256 of `path`. Raises `HashMismatch` if `file` promised another, or another md5."""
    found = digest(path, "sha256")
    if file.sha256 and found != file.sha256:
        raise HashMismatch(mismatch(file.name, "sha256", found, file.sha256))
    if file.md5 and (found_md5 := digest(path, "md5")) != file.md5:
        raise HashMismatch(mismatch(file.name, "md5", found_md5, file.md5))
    return found


def mismatch(name: str, kind: str, found: str, promised: str) -> str:
    return (
        f"{name} is not the file that was promised: its {kind} is {found}, and should be {promised}. "
        "It was thrown away. Pull again; if it happens twice, the source has changed or somebody in between changes it."
    )


def digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=kind != "md5")).hexdigest()


def size_text(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
