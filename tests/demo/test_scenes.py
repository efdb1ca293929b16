"""The little world of the demo weights: what is drawn is what is seen, and what is scored was never trained on."""

import math
from random import Random

import numpy as np
import pytest
import torch
from torch.nn import functional

from scripts.demo import motion
from scripts.demo.image_analysis import look
from scripts.demo.motion import CLIP_HALF, CLIP_SIZES, SPEED, STOP, draw_clip, known_start, random_moving, track
from scripts.demo.prompts import describe, instruct
from scripts.demo.scenes import (
    DIRECTIONS,
    LATTICE,
    PLACES,
    SIZES,
    STILL_HALF,
    Scene,
    covered_cells,
    draw,
    draw_still,
    edited,
    held_out,
    held_out_edit,
    random_scene,
    rgb,
    still_centre,
)
from scripts.demo.text_encoders import t5_tokenizer


def pixels(drawn: torch.Tensor) -> np.ndarray:
    return ((drawn.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("size", [(256, 256), (352, 192), (128, 160)])
def test_what_is_drawn_is_what_is_seen(size: tuple[int, int]):
    random = Random(1)
    for _ in range(30):
        scene = random_scene(random)
        seen = look(pixels(draw(scene, *size)))
        assert seen
        assert (seen.background, seen.colour, seen.shape) == (scene.background, scene.colour, scene.shape)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (448, 256), (256, 384), (320, 256)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_a_still_shape_lies_on_the_lattice_whole_and_in_its_place(size: str, place: str, width: int, height: int):
    scene = Scene("circle", "red", size, place, "blue", scale=1.02, dx=0.01, dy=-0.02)
    x, y = still_centre(scene, width, height)
    assert (x - scene.dx) % LATTICE == (y - scene.dy) % LATTICE == 0
    seen = look(pixels(draw_still(scene, width, height)))
    assert seen and seen.area == pytest.approx(
        math.pi * (scene.radius * STILL_HALF / min(width, height)) ** 2, rel=0.02
    )
    for at, wanted in zip((x, y), PLACES[place], strict=True):
        assert at * wanted > 0.2 or (not wanted and abs(at) <= 0.03)


def test_it_is_seen_in_a_blurred_and_noisy_picture_too():
    random = Random(2)
    torch.manual_seed(2)
    for _ in range(30):
        scene = random_scene(random)
        blurred = functional.avg_pool2d(draw(scene, 256, 256)[None], 9, 1, 4, count_include_pad=False)[0]
        seen = look(pixels(blurred + 0.05 * torch.randn_like(blurred)))
        assert seen
        assert (seen.background, seen.colour, seen.shape) == (scene.background, scene.colour, scene.shape)


def test_nothing_is_seen_where_nothing_is():
    assert look(np.full((64, 64, 3), 200, np.uint8)) is None


def test_a_small_one_is_smaller_than_a_large_one():
    areas = [look(pixels(draw(Scene(size=size), 128, 128))).area for size in ("small", "medium", "large")]  # type: ignore[union-attr]
    assert areas == sorted(set(areas))


def test_what_is_scored_is_never_trained_on():
    random = Random(3)
    assert all(held_out(random_scene(random, test=True)) for _ in range(200))
    for _ in range(200):
        scene = random_scene(random)
        name, after = edited(scene, random)
        assert not held_out(scene)
        assert not held_out(after)
        assert changed(scene, after) == [name]
    edits = [held_out_edit(random) for _ in range(200)]
    assert all(held_out(after) and changed(before, after) == [name] for before, name, after in edits)
    assert {name for _, name, _ in edits} == {"shape", "colour", "size", "place", "background"}


def changed(before: Scene, after: Scene) -> list[str]:
    return [each for each in vars(before) if getattr(before, each) != getattr(after, each)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shape_moves_the_way_that_is_said_and_turns_back_at_the_edge(direction: str):
    clip = draw_clip(Scene(size="small", direction=direction), 128, 128, 56)
    seen = [look(pixels(clip[:, n])) for n in range(0, 56, 4)]
    places = [each.x if direction in ("left", "right") else each.y for each in seen if each]
    steps = np.diff(places)
    forth = steps[0] > 0
    assert len(places) == len(seen)
    assert forth == (direction in ("right", "down"))
    assert (steps[-1] > 0) != forth
    assert np.abs(steps).max() < 4.5 * SPEED / 128  # no jump anywhere


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("width", "height"), [(128, 128), (224, 128), (128, 192)])
def test_a_moving_shape_is_on_the_lattice_every_eighth_frame_and_whole(size: str, width: int, height: int):
    scene = Scene("circle", "red", size, "center", "blue", "right")
    along = [(x * CLIP_HALF + width / 2) for x, _ in track(scene, width, height, 97, STOP)]
    reach = CLIP_SIZES[size] * CLIP_HALF
    assert all(each % STOP == 0 for each in along[::8])
    assert all(reach <= each <= width - reach for each in along)
    assert {abs(step) for step in np.diff(along)} == {SPEED}


@pytest.mark.parametrize("size", CLIP_SIZES)
@pytest.mark.parametrize("direction", ["none", "up"])
def test_a_clips_shape_has_a_size_of_its_own(size: str, direction: str):
    seen = look(pixels(draw_clip(Scene("circle", "red", size, "center", "blue", direction), 224, 128, 9)[:, 8]))
    assert seen and seen.area == pytest.approx(math.pi * (CLIP_SIZES[size] * CLIP_HALF / 128) ** 2, rel=0.02)


def test_half_of_what_is_learned_from_is_small_and_a_third_of_what_is_scored():
    random = Random(1)
    learned, scored = (
        sum(random_moving(random, test).size == "small" for _ in range(600)) / 600 for test in (False, True)
    )
    assert 0.47 < learned < 0.60 and 0.27 < scored < 0.40


@pytest.mark.parametrize("start", [0.0, 40.0])
def test_what_is_said_to_be_covered_is(start: float):
    """Of a picture and of a clip, white on black: each cell is as bright as its pixels on average, at edges nearly."""
    scene = Scene("star", "white", "large", "left", "black", "down")
    black, white = (float(rgb(colour)[0]) for colour in ("black", "white"))
    still, clip = draw_still(scene, 256, 320)[:1], draw_clip(scene, 128, 160, 17, start)[0, ::8]
    for drawn, cells, size in (
        (still, covered_cells(scene, 256, 320, 8)[None], 8),
        (clip, motion.covered_cells(scene, 128, 160, range(0, 17, 8), start, 4), 4),
    ):
        bright = functional.avg_pool2d((drawn - black) / (white - black), size)
        assert bright.shape == cells.shape and float(bright.mean()) > 0.05
        assert float((bright - cells).abs().max()) < 0.35 and float((bright - cells).abs().mean()) < 0.01


def test_what_goes_on_may_be_on_its_way_back():
    random = Random(7)
    ways = set()
    for _ in range(40):
        scene, start = known_start(random, 128, 128, turned=True)
        clip = draw_clip(scene, 128, 128, 9, start)
        first, last = (look(pixels(clip[:, n])) for n in (0, 8))
        assert first and last
        along_x, along_y = DIRECTIONS[scene.direction]
        ways.add(np.sign((last.x - first.x) * along_x + (last.y - first.y) * along_y))
    assert {-1.0, 1.0} <= ways


def test_every_word_of_the_world_is_known():
    random, tokenizer = Random(4), t5_tokenizer()
    for _ in range(100):
        scene = random_moving(random)
        name, after = edited(scene, random)
        for text in (describe(scene, random)[0], instruct(scene, name, getattr(after, name), random)):
            tokens = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in tokens
            assert len(tokens) <= tokenizer.model_max_length
    assert tokenizer.unk_token_id in tokenizer("a cat").input_ids
