"""What is in a picture of the little world, by plain image analysis: no network looks at it."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from scripts.demo.scenes import COLOURS, SHAPES, distances

CANVAS = 96
"""Side of the square on which shapes are compared."""


@dataclass(frozen=True)
class Seen:
    """Lengths and areas are in shares of the picture's shorter side; x and y from its centre."""

    background: str
    colour: str
    shape: str
    area: float
    x: float
    y: float
    likeness: float
    """Of the shape with the best drawing of it: intersection over union."""


def look(picture: np.ndarray) -> Seen | None:
    """At (height, width, 3), 8 bits. None if there is nothing on the background."""
    pixels = picture.astype(np.float32)
    height, width, _ = pixels.shape
    edge = max(2, min(height, width) // 20)
    rim = np.concatenate([pixels[:edge].reshape(-1, 3), pixels[-edge:].reshape(-1, 3),
                          pixels[:, :edge].reshape(-1, 3), pixels[:, -edge:].reshape(-1, 3)])  # fmt: skip
    background = np.median(rim, axis=0)
    away = np.linalg.norm(pixels - background, axis=-1)
    farthest = np.percentile(away, 99.5)
    if farthest < 40:
        return None
    inside = away > farthest / 2
    if inside.sum() < 20:
        return None
    colour = np.median(pixels[away > 0.8 * farthest], axis=0)
    ys, xs = np.nonzero(inside)
    side = min(height, width)
    shape, likeness = classify(inside, float(xs.mean()), float(ys.mean()))
    return Seen(
        background=nearest(background),
        colour=nearest(colour),
        shape=shape,
        area=len(xs) / side**2,
        x=(float(xs.mean()) + 0.5 - width / 2) / side,
        y=(float(ys.mean()) + 0.5 - height / 2) / side,
        likeness=likeness,
    )


def nearest(colour: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def classify(inside: np.ndarray, x: float, y: float) -> tuple[str, float]:
    """The shape that the points, around their centroid, are most like when it is drawn with their area."""
    step = np.sqrt(inside.sum() / unit_area())
    along = (np.arange(CANVAS) + 0.5 - CANVAS / 2) * step
    rows, columns = np.rint(y + along).astype(int), np.rint(x + along).astype(int)
    height, width = inside.shape
    there = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    canvas = there & inside[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)[None, :]]
    likeness = {name: overlap(canvas, mask) for name, mask in templates().items()}
    best = max(likeness, key=lambda name: likeness[name])
    return best, likeness[best]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def unit_area() -> float:
    """Points of the canvas that every shape there covers."""
    return (0.42 * CANVAS) ** 2


@cache
def templates() -> dict[str, np.ndarray]:
    """Every shape with the same area and its centroid in the middle."""
    masks = {}
    for name in SHAPES:
        fine = (torch.arange(400) + 0.5 - 200) / 160
        x, y = torch.meshgrid(fine, fine, indexing="xy")
        inside = distances(name, x, y) < 0
        radius = float(np.sqrt(unit_area() / (float(inside.sum()) / 160**2)))
        middle_x, middle_y = float(x[inside].mean()), float(y[inside].mean())
        axis = (torch.arange(CANVAS) + 0.5 - CANVAS / 2) / radius
        x, y = torch.meshgrid(axis + middle_x, axis + middle_y, indexing="xy")
        masks[name] = (distances(name, x, y) < 0).numpy()
    return masks
