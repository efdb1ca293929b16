"""Family modules by name. Each has `build(weights, residency)` and `loader(weights, device)`."""
# FROM pipelines.base: The words that every family and the server share. Standard library and Pillow only.

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

Tier = Literal["resident", "staged", "streamed"]
"""Where weights are while a job runs: all on the device; only those of the phase; some of them passing through."""
TIERS: tuple[Tier, ...] = get_args(Tier)

OnStep = Callable[[str, int, int], None]
"""Told `(phase, step, steps)` after each step; may raise `JobCancelled` to stop the run at that boundary."""


class JobCancelled(Exception):
    """Raised out of `OnStep`: the job is to stop here."""


class InvalidInput(Exception):
    """The caller's fault: the params or an input file cannot be used. The message is for the caller."""


class UnusableWeights(Exception):
    """The operator's fault: a weights file is missing, truncated or of a kind that is not loaded."""


class InvalidOutput(Exception):
    """The model ran, but what it made is none: NaN or infinite values."""


@dataclass(frozen=True)
class FileFingerprint:
    """A file as it was when its component was described: whoever replaces it changes this, or takes pains not to."""

    name: str
    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> "FileFingerprint | None":
        """None where there is no such file."""
        try:
            stat = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(file.name, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Component:
    """One part of a model with weights of its own.

    `key` is the hash of its files and its dtype: two components with one key hold the same bytes and are loaded once.
    `weights_bytes` is what it takes on a device. `path` is a folder (diffusers layout) or a single file.
    `block_bytes` are those of its blocks, in any order: layers that follow one another and can be streamed.
    `storage` is what its matrices are kept as where that is another than they are computed in. `fingerprints` are its files
    as they were when its key was found: another file under the same name is not loaded. `config` is the folder of the
    component that it stands in for, where its file has no configuration of its own.
    """

    name: str
    key: str
    weights_bytes: int
    path: Path
    dtype: str = "float32"
    block_bytes: tuple[int, ...] = ()
    storage: str | None = None
    fingerprints: tuple[FileFingerprint, ...] = ()
    config: Path | None = None


@dataclass(frozen=True)
class Weights:
    """One model's weights as installed: all that a family needs to load it.

    `architecture` is the diffusers pipeline to run them as, where it is another than their `model_index.json` names.
    `compiled` says that the denoiser's blocks are to be run by torch.compile.
    """

    model: str
    family: str
    folder: Path
    components: tuple[Component, ...]
    architecture: str = ""
    compiled: bool = False

    @property
    def weights_bytes(self) -> int:
        return sum(component.weights_bytes for component in self.components)

    def component(self, name: str) -> Component:
        return next(component for component in self.components if component.name == name)


@dataclass(frozen=True)
class ExecutionMode:
    """How a job is run on its device. `tiled` decodes in tiles.

    What only a worker needs: `phases` are (name, component keys) in order; `streamed_bytes` are (key, bytes), the components
    that are streamed, with the bytes of blocks that may stay on the device.
    """

    tier: Tier = "resident"
    tiled: bool = False
    phases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    streamed_bytes: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.tier}, tiled" if self.tiled else self.tier


@dataclass(frozen=True)
class ComponentStatus:
    """A component that a worker has: on its device since `since_at`, as a copy in host memory, or both."""

    key: str
    name: str
    device_bytes: int
    host_bytes: int
    page_locked: bool
    streamed: bool
    since_at: float


@dataclass(frozen=True)
class Peak:
    """Bytes beside the weights. `working_bytes` were taken from the device, `allocated_bytes` of them were in use."""

    phase: str
    working_bytes: int
    allocated_bytes: int
    weights_bytes: int


@dataclass(frozen=True)
class Loader:
    """How a family loads a component when no run asks for it yet.

    `needs_subprocess`: what loads it changes torch for its whole process, so that no other run may be in that one. Without `returns_module`
    it is made on the device at once (an ONNX session), and there is nothing that host memory could keep.
    """

    load: Callable[[Component], Any]
    needs_subprocess: bool = False
    returns_module: bool = True


class Pipeline(Protocol):
    """A family's object, able to `generate`. Built by the family module's `build(weights, residency)`."""

    def generate(self, params: Any, on_step: OnStep) -> Any:
        """Run once. Returns a `PIL.Image.Image` (RGB or RGBA, 8 bits). Raises `InvalidInput` or `JobCancelled`."""
        ...


def family_module(family: str) -> Any:
    """`flux` → `pipelines.flux`; a dotted name is a family of one's own."""
    return importlib.import_module(family if "." in family else f"pipelines.{family}")
