"""What is installed, and what demo weights there are: quick answers from `weights.lock`, re-read when it changes."""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from pipelines.base import Component, FileFingerprint, Weights
from pipelines.catalog.catalog import Model
from pipelines.weights import verify
from pipelines.weights.formats import GGUF_SUFFIX, WEIGHTS
from pipelines.weights.lock import NAME, Entry, Lock
from pipelines.weights.sizes import GGUF, QUANTISED, STORAGES, class_of_config, gguf_sizes, sizes_of

NOT_PART_OF_A_CONFIG = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
"""Who saved a component, and how: none of it changes what is computed."""

Status = Literal["installed", "demo", "missing", "none"]
"""Of a model's weights, best first."""

NETWORK = "network"
"""The one component of a model that is a single file."""


class Installed:
    """Reads the weights folder `root`. Nothing is hashed: `plantain verify` does that.

    With `demo`, also the demo weights: they come with the program, so they are looked for once.
    """

    def __init__(self, root: Path, demo: bool = True) -> None:
        self.root, self.has_demo = root, demo
        self.demos: dict[str, Entry | None] = {}
        self.stamp: object = None
        self.lock = Lock()
        self.components: dict[tuple[object, ...], tuple[Component, ...]] = {}

    def weights(self, model: Model) -> Weights | None:
        """None unless every file is there with its recorded size. Raises `UnusableWeights` for a broken file."""
        self.refresh()
        entry = self._entry(model)
        if entry is None:
            return None
        base = self.weights(model.base) if model.base else None
        if model.base and base is None:
            return None
        folder = entry.path(self.root)
        loaded = (model.id, model.dtype, model.quantisation, *sorted(model.dtypes.items()))
        if loaded not in self.components:
            components = stand_in(folder, entry, model, base) if base else find_components(folder, entry, model)
            self.components[loaded] = tuple(components)
        folder = base.folder if base else folder
        return Weights(
            model.id, model.family or "", folder, self.components[loaded], model.architecture, model.compiled
        )

    def demo(self, model: Model) -> Model | None:
        """The model on demo weights, if there are any for it. Raises `UnusableWeights` for broken ones."""
        return model.demo if model.demo and self.weights(model.demo) else None

    def stand_in(self, model: Model) -> Model | None:
        """The same, for a model that was never installed: demo weights do not hide that installed ones are damaged."""
        self.refresh()
        return None if model.id in self.lock.models else self.demo(model)

    def status(self, model: Model) -> Status:
        """`none`: there is nothing to install, the model runs at fal only. With variants, that of the best of them."""
        if model.variants:
            statuses = {self.status(each) for able in model.variants.values() for each in able}
            return next(status for status in get_args(Status) if status in statuses)
        if model.weights is None:
            return "none"
        if self.weights(model):
            return "installed"
        return "demo" if self.stand_in(model) else "missing"

    def _entry(self, model: Model) -> Entry | None:
        if model.weights is None:
            return None
        if model.stands_for:
            return self._demo_entry(model.weights.path) if self.has_demo else None
        entry = self.lock.models.get(model.id)
        return entry if entry and entry.intact(self.root) else None

    def _demo_entry(self, path: str) -> Entry | None:
        if path not in self.demos:
            self.demos[path] = verify.read_entry(Path(path))
        return self.demos[path]

    def refresh(self) -> None:
        stamp = stamp_of(self.root / NAME)
        if stamp != self.stamp:
            self.lock, self.stamp, self.components = Lock.read(self.root), stamp, {}


def stamp_of(path: Path) -> object:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def find_components(folder: Path, entry: Entry, model: Model) -> list[Component]:
    """One for each folder with weights in it; what lies beside such folders is the same once more, in one file."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in sorted(entry.files):
        if name.endswith(WEIGHTS):
            by_folder[str(PurePosixPath(name).parent)].append(name)
    if list(by_folder) == ["."]:
        return [component(folder, entry, name, [name], model) for name in by_folder["."][:1]]
    return [component(folder, entry, part, names, model) for part, names in by_folder.items() if part != "."]


def stand_in(folder: Path, entry: Entry, model: Model, base: Weights) -> list[Component]:
    """The base's components, but its denoiser's weights from the model's one GGUF file."""
    plain = base.component(QUANTISED[0])
    name = next(name for name in entry.files if name.endswith(GGUF_SUFFIX))
    identity = [entry.files[name].sha256, config_of(plain.path), plain.dtype, GGUF]
    sizes = gguf_sizes(folder / name, plain.dtype, class_of_config(plain.path))
    stamp = FileFingerprint.of(folder / name)
    denoiser = replace(
        plain,
        key=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        weights_bytes=sizes.weights_bytes,
        path=folder / name,
        block_bytes=sizes.block_bytes,
        storage=GGUF,
        fingerprints=(stamp,) if stamp else (),
        config=plain.path,
    )
    return [denoiser if each is plain else each for each in base.components]


def component(folder: Path, entry: Entry, part: str, names: list[str], model: Model) -> Component:
    path = folder / part
    dtype = model.dtypes.get(part, model.dtype)
    storage = STORAGES.get(model.quantisation or "") if part in QUANTISED else None
    identity = [sorted(entry.files[name].sha256 for name in names), config_of(path), dtype]
    identity += [storage] if storage else []
    files = [folder / name for name in names]
    sizes = sizes_of(part, files, dtype, class_of_config(path), storage)
    return Component(
        name=NETWORK if path.suffix in WEIGHTS else part,
        key=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        weights_bytes=sizes.weights_bytes,
        path=path,
        dtype=dtype,
        block_bytes=sizes.block_bytes,
        storage=storage,
        fingerprints=tuple(stamp for file in files if (stamp := FileFingerprint.of(file))),
    )


def config_of(path: Path) -> dict[str, object]:
    """The component's own configuration, less what differs between equal components."""
    if not (path / "config.json").is_file():
        return {}
    config = json.loads((path / "config.json").read_text("utf-8"))
    return {key: value for key, value in config.items() if key not in NOT_PART_OF_A_CONFIG}
