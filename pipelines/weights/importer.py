"""Weights brought on a disk, for machines with no network: `plantain import`."""

from pathlib import Path

from pipelines.catalog.catalog import Catalog, Model
from pipelines.weights.errors import NotFound, NothingToPull
from pipelines.weights.folder import Folder, Installation
from pipelines.weights.install import OnProgress, install, silent
from pipelines.weights.lock import NAME, PARTIAL, Lock, locked, record_acceptance
from pipelines.weights.pull import check_licence


def import_folder(
    folder: Path,
    root: Path,
    catalog: Catalog,
    *,
    model: Model | None = None,
    accept_licence: bool = False,
    on_progress: OnProgress = silent,
) -> list[str]:
    """Copies weights from `folder` and checks them; returns the ids of the models.

    `folder` is another machine's data or weights folder, all of it or the one `model`; or, for a `model` that must then
    be named, a diffusers folder or a single file.
    """
    for candidate in (folder, folder / "weights"):
        if (candidate / NAME).is_file():
            return import_locked(candidate, root, catalog, model, on_progress)
    if model is None:
        raise NotFound(f"{folder} has no {NAME}, so say which model it is: plantain import {folder} --model ID")
    with locked(root / PARTIAL / f"{model.id}.flock"):
        check_licence(model, root, accept_licence)
        source = {"kind": "import", "path": str(folder.resolve())}
        install(model, root, Folder(model, folder), source, on_progress)
    return [model.id]


def import_locked(folder: Path, root: Path, catalog: Catalog, only: Model | None, on_progress: OnProgress) -> list[str]:
    """Every model that both the other machine and this one's `weights.toml` know."""
    lock = Lock.read(folder)
    names = [name for name in lock.models if name in catalog.with_loras and (only is None or name == only.id)]
    if not names:
        raise NothingToPull(
            f"{folder / NAME} lists {', '.join(lock.models) or 'nothing'}, and nothing of it is wanted."
        )
    for name in names:
        import_entry(folder, root, lock, catalog.with_loras[name], on_progress)
    return names


def import_entry(folder: Path, root: Path, lock: Lock, model: Model, on_progress: OnProgress) -> None:
    """With its source and commit, and the licence's acceptance, as the other machine recorded them."""
    entry = lock.models[model.id]
    with locked(root / PARTIAL / f"{model.id}.flock"):
        if model.id in lock.accepted:
            record_acceptance(root, model.id, lock.accepted[model.id])
        check_licence(model, root, accept=False)
        install(model, root, Installation(folder, entry), dict(entry.source), on_progress)
