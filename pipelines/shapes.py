"""Reads what a model makes, and the memory that this takes: parts of `weights.toml`."""

from collections.abc import Mapping
from typing import Any

from pipelines.catalog import Frames, PhaseWorking, Working
from pipelines.tables import CatalogError, Table, checked

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
