"""`SHA256SUMS`: what the files of weights that come with the program should be, as coreutils' `sha256sum` writes it."""

import re
from collections.abc import Mapping
from pathlib import Path

from pipelines.weights.errors import Damaged
from pipelines.weights.files import inside
from pipelines.weights.lock import Entry, FileRecord, size_of

NAME = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def read_sums(folder: Path) -> Mapping[str, str]:
    """Each file's sha256, by its name in the folder. Raises `Damaged`."""
    try:
        lines = [LINE.fullmatch(line) for line in (folder / NAME).read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise Damaged(f"{folder} has no {NAME}; scripts/sums writes it.") from None
    if not lines or not all(line and inside(line[2]) for line in lines):
        raise Damaged(f"{folder / NAME} is not what sha256sum writes.")
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
