"""The world that the demo weights know: one shape of one colour on a plain background, still or moving.

Coordinates are in half the canvas's shorter side, from its centre: x to the right, y down. A scene is drawn from its
signed distances, so an edge is smooth at any size and nothing is read from a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from PIL import ImageColor

COLOURS = {
    "red": (220, 40, 40), "orange": (250, 140, 20), "yellow": (250, 220, 50), "green": (40, 160, 70),
    "cyan": (70, 200, 220), "blue": (40, 80, 210), "purple": (130, 60, 180), "pink": (250, 150, 190),
    "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
FAR = 0.5
"""Apart are two colours that nobody takes for the same, of red, green and blue from -1 to 1."""
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross")
SIZES = {"small": 0.30, "medium": 0.42, "large": 0.58}
"""Radius of a shape."""
PLACES = {
    "center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1),
    "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MARGIN = 0.08
"""Between a shape at an edge and that edge, at least."""
LATTICE = 0.25
"""Apart are the places for the centres of shapes in what the demo is trained on."""
STILL_HALF = 128
"""Pixels: the unit of length in still pictures."""


@dataclass(frozen=True)
class Scene:
    """What a prompt can say, and the small chances that it cannot: `scale`, `dx` and `dy`.

    A colour is one of `COLOURS`, or a nameless one as #rrggbb.
    """

    shape: str = "circle"
    colour: str = "red"
    size: str = "medium"
    place: str = "center"
    background: str = "white"
    direction: str = "none"
    scale: float = 1.0
    dx: float = 0.0
    dy: float = 0.0

    @property
    def radius(self) -> float:
        return SIZES[self.size] * self.scale


ATTRIBUTES = {
    "shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES),
    "background": tuple(COLOURS), "direction": tuple(DIRECTIONS),
}  # fmt: skip
"""What a prompt may name."""


def held_out(scene: Scene) -> bool:
    """One combination of shape, colour and background in nine is never trained on: the scores ask for these."""
    colours = list(COLOURS)
    number = SHAPES.index(scene.shape) + 3 * colours.index(scene.colour) + 5 * colours.index(scene.background)
    return number % 9 == 4


def random_scene(random: Random, test: bool = False) -> Scene:
    """One that is held out for `test`, one that is not otherwise; still, with its small chances drawn."""
    while True:
        scene = Scene(
            shape=random.choice(SHAPES),
            colour=random.choice(list(COLOURS)),
            size=random.choice(list(SIZES)),
            place=random.choice(list(PLACES)) if random.random() < 0.7 else "center",
            background=random.choice(list(COLOURS)),
        )
        if scene.colour != scene.background and held_out(scene) is test:
            return with_chances(scene, random)


def with_chances(scene: Scene, random: Random) -> Scene:
    near = 0.02
    return replace(
        scene, scale=random.uniform(0.97, 1.03), dx=random.uniform(-near, near), dy=random.uniform(-near, near)
    )


def edited(scene: Scene, random: Random) -> tuple[str, Scene]:
    """The name of one attribute, and a scene that is not held out with another value of it: nor is that one."""
    while True:
        name, after = edited_freely(scene, random)
        if not held_out(after):
            return name, after


def held_out_edit(random: Random) -> tuple[Scene, str, Scene]:
    """A scene, the name of one attribute, and the scene with another value of it, which is held out."""
    while True:
        before = random_scene(random, test=random.random() < 0.5)
        name, after = edited_freely(before, random)
        if held_out(after):
            return before, name, after


def edited_freely(scene: Scene, random: Random) -> tuple[str, Scene]:
    while True:
        name = random.choice(("colour", "colour", "background", "background", "shape", "size", "place"))
        value = random.choice([value for value in ATTRIBUTES[name] if (name, value) != ("size", "medium")])
        after = replace(scene, **{name: value})
        if after != scene and after.colour != after.background:
            return name, after


def distances(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to the edge of a shape of radius 1 around the origin, negative inside; near the edge, exact."""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85
    if shape == "diamond":  # higher than wide, so that it is no turned square
        return (x.abs() / 0.68 + y.abs() - 1) / math.hypot(1 / 0.68, 1)
    if shape == "triangle":
        return polygon_planes(x, y - 0.15, 3, 0.55).amax(0)
    if shape == "star":  # inside all but one of the five lines that make a pentagram
        return polygon_planes(-x, -y + 0.06, 5, 0.40).topk(2, dim=0).values[1]
    if shape == "heart":  # a square on its corner, and a circle on each of its upper sides
        half = 0.46
        centre = 0.10
        turned = torch.maximum((x + y - centre).abs(), (x - y + centre).abs()) / math.sqrt(2) - half
        sides = [
            torch.hypot(x - side * half / math.sqrt(2), y - centre + half / math.sqrt(2)) - half for side in (-1, 1)
        ]
        return torch.minimum(turned, torch.minimum(*sides))
    if shape == "cross":
        return torch.minimum(
            torch.maximum(x.abs() - 0.95, y.abs() - 0.32), torch.maximum(x.abs() - 0.32, y.abs() - 0.95)
        )
    raise ValueError(f"no shape {shape!r}")


def polygon_planes(x: torch.Tensor, y: torch.Tensor, sides: int, inner: float) -> torch.Tensor:
    """Distances from the lines through a regular polygon's sides, (sides, ...); one side lies at the bottom."""
    angles = [math.pi / 2 + 2 * math.pi * n / sides for n in range(sides)]
    return torch.stack([x * math.cos(angle) + y * math.sin(angle) - inner for angle in angles])


def rgb(colour: str) -> torch.Tensor:
    """(3,), from -1 to 1."""
    return torch.tensor(COLOURS.get(colour) or ImageColor.getrgb(colour)) / 127.5 - 1


def nameless_colour(random: Random, unlike: tuple[str, ...] = ()) -> str:
    """One that is far from all that have a name, and from these."""
    away_from = [rgb(colour) for colour in (*COLOURS, *unlike)]
    while True:
        colour = f"#{random.randrange(2**24):06x}"
        if all((rgb(colour) - each).norm() > FAR for each in away_from):
            return colour


def centre_of(scene: Scene, extent: tuple[float, float]) -> tuple[float, float]:
    """Of the shape, on a canvas that reaches `extent` from its centre."""
    x, y = (side * (reach - scene.radius - MARGIN) for side, reach in zip(PLACES[scene.place], extent, strict=True))
    return x + scene.dx, y + scene.dy


def covered(
    scene: Scene, width: int, height: int, centre: tuple[float, float] | None = None, half: float | None = None
) -> torch.Tensor:
    """(height, width), 1 where the shape is. `half` is the unit of length in pixels; else half the shorter side."""
    half = half or min(width, height) / 2
    at_x, at_y = centre or centre_of(scene, (width / 2 / half, height / 2 / half))
    x = ((torch.arange(width) + 0.5 - width / 2) / half - at_x) / scene.radius
    y = ((torch.arange(height) + 0.5 - height / 2) / half - at_y) / scene.radius
    pixels_out = distances(scene.shape, x[None, :].expand(height, width), y[:, None].expand(height, width))
    return (0.5 - pixels_out * scene.radius * half).clamp(0, 1)


def draw(
    scene: Scene, width: int, height: int, centre: tuple[float, float] | None = None, half: float | None = None
) -> torch.Tensor:
    """(3, height, width), from -1 to 1, of what is covered as above."""
    inside = covered(scene, width, height, centre, half)
    return torch.lerp(rgb(scene.background)[:, None, None], rgb(scene.colour)[:, None, None], inside)


def still_centre(scene: Scene, width: int, height: int, half: int = STILL_HALF) -> tuple[float, float]:
    """Of the shape in a still picture, in units of `half` pixels: on the lattice, but for its small chances.

    A quarter of the unit is a token of the demo's transformers, in pictures and in clips, so that a shape looks the
    same to them wherever it is.
    """
    plain = replace(scene, scale=1.0, dx=0.0, dy=0.0)
    centre = centre_of(plain, (width / 2 / half, height / 2 / half))
    x, y = (math.copysign((abs(at) + 1e-6) // LATTICE * LATTICE, at) for at in centre)
    return x + scene.dx, y + scene.dy


def draw_still(scene: Scene, width: int, height: int) -> torch.Tensor:
    """(3, height, width), from -1 to 1: shapes are as large on every canvas as on one of 256 x 256."""
    return draw(scene, width, height, still_centre(scene, width, height), STILL_HALF)


def covered_cells(scene: Scene, width: int, height: int, cell: int) -> torch.Tensor:
    """(height / cell, width / cell): how much of each of a still picture's cells of so many pixels the shape covers."""
    return covered(scene, width // cell, height // cell, still_centre(scene, width, height), STILL_HALF / cell)


def draw_batch(scenes: Sequence[Scene], width: int, height: int) -> torch.Tensor:
    """(count, 3, height, width), from -1 to 1."""
    return torch.stack([draw(scene, width, height) for scene in scenes])
