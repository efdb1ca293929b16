"""Flux's scores: pictures from words, from a picture, and Kontext's edits."""

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from pipelines.residency.residency import Residency
from scripts.demo.evaluation import KEPT, PROMPTS, Demo, Tally, picture_of, saved
from scripts.demo.image_analysis import Seen, look
from scripts.demo.prompts import describe, instruct
from scripts.demo.scenes import (
    COLOURS,
    PLACES,
    SIZES,
    STILL_HALF,
    Scene,
    draw_still,
    held_out_edit,
    random_scene,
    still_centre,
)


def score_flux(count: int = PROMPTS) -> Iterable[Tally]:
    residency = Residency("cpu")
    yield from_text(Demo("flux-dev", residency), count, "flux-dev, text-to-image")
    yield from_text(Demo("flux-schnell", residency), count, "flux-schnell, 4 steps", num_inference_steps=4)
    yield from_picture(Demo("flux-dev", residency), count // 2)
    yield kontext(Demo("flux-kontext", residency), count)


def from_text(demo: Demo, count: int, title: str, **more: Any) -> Tally:
    tally, random = Tally(title), Random(1)
    sizes = list(demo.model.sizes.values())
    for n in range(count):
        scene = random_scene(random, test=True)
        size = demo.model.sizes["1:1"] if n % 2 else random.choice(sizes)
        seen = look(demo.image(describe(scene, random, whole=True)[0], seed=n, size=size, **more))
        tally.add("background colour", seen is not None and seen.background == scene.background)
        tally.add("shape colour", seen is not None and seen.colour == scene.colour)
        tally.add("shape class", seen is not None and seen.shape == scene.shape)
        tally.add("place", seen is not None and in_place(seen, scene, size))
        if n % 4 == 0:
            tally.add("size order", in_order(demo, scene, n, more))
    return tally


def in_order(demo: Demo, scene: Scene, seed: int, more: dict[str, Any]) -> bool:
    """Small is smaller than medium, medium than large, with the same seed and the same words."""
    prompts = [describe(replace(scene, size=size), Random(seed), whole=True)[0] for size in SIZES]
    areas = [seen.area if (seen := look(demo.image(prompt, seed, **more))) else 0 for prompt in prompts]
    return areas == sorted(set(areas))


def in_place(seen: Seen, scene: Scene, size: tuple[int, int]) -> bool:
    """Nearer to where it was asked to be than to any other place."""
    unit = STILL_HALF / min(size)

    def distance(place: str) -> float:
        x, y = still_centre(replace(scene, place=place, dx=0, dy=0), *size)
        return float(np.hypot(seen.x - x * unit, seen.y - y * unit))

    return min(PLACES, key=distance) == scene.place


def from_picture(demo: Demo, count: int) -> Tally:
    """Another colour for what is on the picture, at the demo's own strength: where and how large it is stays."""
    tally, random = Tally("flux-dev, image-to-image"), Random(2)
    for n in range(count):
        scene = random_scene(random, test=True)
        target = replace(scene, colour=random.choice([each for each in COLOURS if each != scene.background]))
        before = picture_of(draw_still(scene, 256, 256))
        with saved(before) as file:
            strength = demo.model.defaults["strength"]
            after = demo.image(describe(target, random, whole=True)[0], n, images=(file,), strength=strength)
        compare(tally, look(np.asarray(before)), look(after), target, changed="colour")
    return tally


def kontext(demo: Demo, count: int) -> Tally:
    tally, random = Tally("flux-kontext, edits"), Random(3)
    for n in range(count):
        scene, name, target = held_out_edit(random)
        before = picture_of(draw_still(scene, 256, 256))
        with saved(before) as file:
            after = demo.image(instruct(scene, name, getattr(target, name), random), n, images=(file,), strength=1.0)
        compare(tally, look(np.asarray(before)), look(after), target, changed=name)
    return tally


def compare(tally: Tally, before: Seen | None, after: Seen | None, target: Scene, changed: str | None) -> None:
    """`changed` is the attribute that was asked for; the others must be as they were."""
    if before is None or after is None:
        tally.add("something is there", False)
        return
    for name in ("background", "colour", "shape"):
        claim = f"{name}, as asked" if name == changed else f"{name} kept"
        tally.add(claim, getattr(after, name) == getattr(target, name))
    if changed != "shape":
        tally.add(f"shape kept, {changed} asked", after.shape == target.shape)
    if changed not in ("place", "shape", "size"):
        tally.add("place kept", float(np.hypot(after.x - before.x, after.y - before.y)) < KEPT)
        tally.add("size kept", 0.75 < after.area / before.area < 1.33)
    if changed == "size":
        tally.add("size, as asked", (after.area > before.area) == (target.size == "large") or near(before, after))
    if changed == "place":
        tally.add("place, as asked", in_place(after, target, (256, 256)))


def near(before: Seen, after: Seen) -> bool:
    """A large one that is to be larger, and is that already."""
    return 0.9 < after.area / before.area < 1.1
