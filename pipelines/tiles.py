"""Cuts a picture into windows that overlap, so that a network with a bounded view sees all it needs of each part."""

from dataclasses import dataclass
from itertools import pairwise

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, as Pillow has them."""


@dataclass(frozen=True)
class Span:
    """One window along one axis: the network reads `start` to `stop`, and `first` to `last` of it is kept."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tile:
    """A part of a picture: the network reads `window`, and of that `kept` is kept. The kept parts make the picture."""

    window: Box
    kept: Box


def cut(size: tuple[int, int], side: int, context: int, multiple: int = 1) -> list[Tile]:
    """Tiles, row by row, of a picture of `size` (width, height); the lengths are as in `cut_length`."""
    columns, rows = (cut_length(length, side, context, multiple) for length in size)
    return [Tile((x.start, y.start, x.stop, y.stop), (x.first, y.first, x.last, y.last)) for y in rows for x in columns]


def cut_length(length: int, side: int, context: int, multiple: int = 1) -> list[Span]:
    """The fewest equal windows of about `side` pixels at most that keep `context` real pixels around what is kept.

    A window ends at the picture's edge, never beyond it: there the network pads as it does for a whole picture.
    Windows start at multiples of `multiple`, where a network that folds pixels sees them as in the whole picture;
    for that, `side` and `context` are rounded up to it.
    """
    side, context = up_to(side, multiple), up_to(context, multiple)
    count = max(1, ceil_div(length - 2 * context, side - 2 * context))
    window = up_to(ceil_div(length + 2 * context * (count - 1), count), multiple)
    room = max(0, length - window)
    starts = [room * i // max(1, count - 1) // multiple * multiple for i in range(count)]
    stops = [start + window for start in starts[:-1]] + [length]
    seams = [(start + stop) // 2 for stop, start in zip(stops, starts[1:], strict=False)]
    return [Span(*span) for span in zip(starts, stops, *zip(*pairwise([0, *seams, length]), strict=True), strict=True)]


def up_to(length: int, multiple: int) -> int:
    return ceil_div(length, multiple) * multiple


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
