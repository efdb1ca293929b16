"""Types and errors that every family and the server share, and `family_module`. Standard library only.

A family is a module with `build(weights, residency)` and `loader(weights, device)`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

Tier = Literal["resident", "staged", "streamed"]
"""Which weights are on the device while a job runs: all; those of the current phase; a part, the rest streamed."""
TIERS: tuple[Tier, ...] = get_args(Tier)

STREAMING_SLOTS = 2
"""Device buffers for streamed blocks: one block is computed with while the next one is copied in."""

OnStep = Callable[[str, int, int], None]
"""Called with `(phase, step, steps)` after each step; may raise `JobCancelled` to stop the run at that point."""


class JobCancelled(Exception):
    """Raised by `OnStep` to stop the job."""


class InvalidInput(Exception):
    """The params or an input file cannot be used: the caller's fault. The message is shown to the caller."""


class UnusableWeights(Exception):
    """A weights file is missing, truncated or of an unsupported kind: the operator's fault."""


class InvalidOutput(Exception):
    """The model ran, but its output has NaN or infinite values."""


@dataclass(frozen=True)
class FileFingerprint:
    """A file's size and modification time when its component was described: a changed one means a replaced file."""

    name: str
    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> "FileFingerprint | None":
        """None if there is no such file."""
        try:
            stat = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(file.name, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Component:
    """One part of a model with weights of its own.

    `key` is the hash of its files and its dtype: components with the same key have the same bytes and are loaded once.
    `weights_bytes` is its size on a device. `path` is a folder (diffusers layout) or a single file.
    `block_bytes` are the sizes of its blocks, in any order: successive layers, which can be streamed.
    `storage` is the format in which its matrices are stored, if other than the dtype that computes. `fingerprints` are
    those of its files when the key was computed: a file that differs is not loaded. `config` is the folder of the
    component that it replaces, if its file has no configuration of its own (GGUF).
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

    `architecture` is the diffusers pipeline to run them with, if other than the one in their `model_index.json`.
    `compiled`: run the denoiser's blocks through torch.compile.
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
    """How a job runs on its device: which weights are there when, and whether the VAE decodes in tiles.

    Only workers need the rest: `phases` are (name, component keys), in order; `streamed_bytes` are (key, bytes) of the
    components that are streamed, with the bytes of their blocks that may stay on the device.
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
    """A component that a worker has, since `since_at`: on its device, as a copy in host memory, or both."""

    key: str
    name: str
    device_bytes: int
    host_bytes: int
    page_locked: bool
    streamed: bool
    since_at: float


@dataclass(frozen=True)
class Peak:
    """The highest memory use of a phase, without weights: reserved on the device, and of that in use (allocated)."""

    phase: str
    working_bytes: int
    allocated_bytes: int
    weights_bytes: int


@dataclass(frozen=True)
class Loader:
    """How a family loads a component outside of a run, for prefetching.

    `needs_subprocess`: loading changes torch for the whole process, so it must not happen beside a run.
    Without `returns_module`, `load` returns an object that is on the device already (an ONNX session), of which host
    memory keeps no copy.
    """

    load: Callable[[Component], Any]
    needs_subprocess: bool = False
    returns_module: bool = True


class Pipeline(Protocol):
    """One model, loaded by its family's `build(weights, residency)`."""

    def generate(self, params: Any, on_step: OnStep) -> Any:
        """Runs once. Returns a `PIL.Image.Image` (RGB or RGBA, 8 bits) or a `VideoOutput`.

        Raises `InvalidInput`, `UnusableWeights`, `InvalidOutput`, and whatever `on_step` raises.
        """
        ...


def family_module(family: str) -> Any:
    """The module of a family: `flux` is `pipelines.flux`; a dotted name is a module outside of this package."""
    return importlib.import_module(family if "." in family else f"pipelines.{family}")


def round_to_multiple(length: float, multiple: int) -> int:
    """The nearest multiple, at least one."""
    return max(multiple, round(length / multiple) * multiple)
