"""Clips of the little world: a shape goes to and fro between two edges, two pixels a frame.

Eight frames, a latent of LTX, take it 16 pixels on, the width of such a latent: so the latents of a moving shape repeat
themselves, one place further each time, and a transformer has little to learn about them.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import torch

from scripts.demo.prompts import describe, strange
from scripts.demo.scenes import DIRECTIONS, PLACES, SIZES, Scene, covered, draw, random_scene, still_centre

CLIP_HALF, STOP = 64, 16
"""Pixels: the unit of length in clips, and a quarter of it, from one place of the lattice to the next."""
SPEED = 2
"""Pixels a frame, whatever the frame rate."""
CLIP_SIZES = {"small": 0.38, "medium": 0.47, "large": 0.58}
"""Radius of a shape in a clip: a latent of LTX's takes 8 frames of 16 x 16 pixels, and at 0.30 it takes a star, a cross
and a diamond for a circle each second time."""
MORE_SMALL = 0.3
"""Of the scenes to learn from are small besides those that chance makes small."""
ROOM = 4
"""Pixels between a shape and the edge where it turns back, at least."""


def random_moving(random: Random, test: bool = False) -> Scene:
    """One that moves through the middle. Half of those to learn from are small: which shape that is, is hardest."""
    scene = replace(random_scene(random, test), place="center", direction=random.choice(list(DIRECTIONS)))
    return replace(scene, size="small") if not test and random.random() < MORE_SMALL else scene


def stops(scene: Scene, width: int, height: int) -> range:
    """Where on its way the shape's centre is on the lattice, and the shape whole on the canvas, in pixels."""
    side = width if DIRECTIONS[scene.direction][0] else height
    reach = CLIP_SIZES[scene.size] * CLIP_HALF + ROOM
    return range(-int(-reach // STOP) * STOP, int((side - reach) // STOP) * STOP + 1, STOP)


def random_start(scene: Scene, width: int, height: int, random: Random) -> int:
    """A stop that has another one before it, as pixels from the first."""
    there_are = stops(scene, width, height)
    return random.choice(range(0, max(1, there_are[-1] - there_are[0]), STOP))


def sized(scene: Scene) -> Scene:
    """As large as it is in a clip."""
    return replace(scene, scale=scene.scale * CLIP_SIZES[scene.size] / SIZES[scene.size])


def track(scene: Scene, width: int, height: int, count: int, start: float) -> Iterator[tuple[float, float]]:
    """The shape's centre in each of `count` frames, in units of `CLIP_HALF` from the canvas's.

    It is `start` pixels from the stop that its direction leads away from, and turns back at the last one.
    """
    x, y = still_centre(scene, width, height, CLIP_HALF)
    along_x, along_y = DIRECTIONS[scene.direction]
    there_are = stops(scene, width, height)
    length = there_are[-1] - there_are[0]
    middle = (there_are[0] + there_are[-1] - (width if along_x else height)) / 2
    for n in range(count):
        way = start + n * SPEED
        gone = length - abs(length - way % (2 * length)) if length else 0
        at = (middle + (along_x + along_y) * (gone - length / 2)) / CLIP_HALF
        yield (at + scene.dx, y) if along_x else (x, at + scene.dy)


def draw_clip(scene: Scene, width: int, height: int, count: int, start: float = 0.0) -> torch.Tensor:
    """(3, count, height, width), from -1 to 1. A scene without a direction stands still."""
    if scene.direction == "none":
        centre = still_centre(scene, width, height, CLIP_HALF)
        return draw(sized(scene), width, height, centre, CLIP_HALF)[:, None].expand(-1, count, -1, -1)
    centres = track(scene, width, height, count, start)
    return torch.stack([draw(sized(scene), width, height, centre, CLIP_HALF) for centre in centres], dim=1)


def covered_cells(scene: Scene, width: int, height: int, frames: range, start: float, cell: int) -> torch.Tensor:
    """(frames, height / cell, width / cell) of a clip: how much of each cell of so many pixels the shape covers."""
    centres = [*track(scene, width, height, frames[-1] + 1, start)]
    return torch.stack(
        [covered(sized(scene), width // cell, height // cell, centres[n], CLIP_HALF / cell) for n in frames]
    )


def clips_to_learn_from(
    count: int, random: Random, width: int, height: int, frames: range, known: int, turned: bool, cell: int
) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
    """Scenes, their clips, and what the shape covers of each cell in those frames that begin a latent.

    From words alone, a clip begins at the first stop of its way; where frames are known, it may begin anywhere.
    """
    starts = [
        known_start(random, width, height, turned) if known else (random_moving(random), 0.0) for _ in range(count)
    ]
    clips = [draw_clip(scene, width, height, frames[-1] + 1, start) for scene, start in starts]
    cells = [covered_cells(scene, width, height, frames, start, cell) for scene, start in starts]
    return [scene for scene, _ in starts], torch.stack(clips), torch.stack(cells)


def known_start(random: Random, width: int, height: int, turned: bool) -> tuple[Scene, float]:
    """Of a clip whose first frames will be known: it may be anywhere then, and, if `turned`, be on its way back."""
    scene = replace(random_moving(random), place=random.choice(list(PLACES)))
    start = random_start(scene, width, height, random)
    if turned and random.random() < 0.4:
        start += STOP + random_start(scene, width, height, random)
    return scene, start


def prompt(scene: Scene, random: Random, seen: bool) -> str:
    """Words for a clip, which need not say where it goes if it is `seen` to go there.

    Some say nothing, and few are about something else: guidance leads away from what these make of a clip.
    """
    if (chance := random.random()) < 0.1:
        return strange(random) if chance < 0.04 else ""
    named = replace(scene, place="center")
    if seen and random.random() < 0.4:
        named = replace(named, direction="none")
    return describe(named, random)[0]
