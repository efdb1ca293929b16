"""How well the demo does what it is asked: prompts it was never trained on, through the server's own pipelines."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from pipelines.base import Way
from pipelines.catalog import Catalog
from pipelines.clips import Clip
from pipelines.installed import Installed
from pipelines.params import ExtendVideo, ImageToImage, ImageToVideo, TextToImage, TextToVideo
from pipelines.residency import Residency
from scripts.demo.seen import Seen, look
from scripts.demo.world import (
    DIRECTIONS,
    PLACES,
    SIZES,
    Scene,
    centre_of,
    describe,
    draw,
    edited,
    instruct,
    random_moving,
    random_scene,
)

PROMPTS = 200
KEPT = 0.08
"""How far a shape that should stay may be off, in shares of the shorter side."""


class Tally:
    """Of each claim, how often it was checked and how often it held."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.held: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()

    def add(self, claim: str, held: bool) -> None:
        self.checked[claim] += 1
        self.held[claim] += held

    def lines(self) -> Iterable[str]:
        for claim, count in self.checked.items():
            share = 100 * self.held[claim] / count
            yield f"{self.title:<36} {claim:<28} {share:6.1f} %   {self.held[claim]} of {count}"


class Demo:
    """A model's demo weights in the pipeline that the server runs them in, with the demo's own defaults."""

    def __init__(self, name: str, residency: Residency) -> None:
        model = Catalog.load().find(name).demo
        weights = Installed(Path(tempfile.mkdtemp())).weights(model) if model else None
        if model is None or weights is None:
            raise SystemExit(f"{name} has no demo weights")
        self.model, self.residency = model, residency
        self.pipeline = family(weights.family).build(weights, residency)

    def run(self, params: Any) -> Any:
        self.residency.begin(Way())
        return self.pipeline.generate(params, lambda phase, step, steps: self.residency.enter(phase))

    def image(self, prompt: str, seed: int, size: tuple[int, int] = (256, 256), **more: Any) -> np.ndarray:
        values = {"num_inference_steps": self.model.defaults["num_inference_steps"]} | more
        kind = ImageToImage if "images" in more else TextToImage
        return np.asarray(self.run(kind(prompt=prompt, width=size[0], height=size[1], seed=seed, **values)))

    def clip(self, prompt: str, seed: int, kind: Any = TextToVideo, **more: Any) -> np.ndarray:
        """(frames, height, width, 3); two seconds of the usual size."""
        frames = self.model.frames
        assert frames is not None
        width, height = self.model.sizes["1:1"]
        count = round(2 * frames.fps[0] / frames.step) * frames.step
        values = {"fps": frames.fps[0], "num_frames": count + (0 if kind is ExtendVideo else 1), "guidance_scale": 1.0,
                  "num_inference_steps": self.model.defaults["num_inference_steps"]} | more  # fmt: skip
        return self.run(kind(prompt=prompt, width=width, height=height, seed=seed, **values)).frames


def family(name: str) -> Any:
    return import_module(f"pipelines.{name}")


# Pictures


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
    half = min(size) / 2
    extent = (size[0] / 2 / half, size[1] / 2 / half)

    def distance(place: str) -> float:
        x, y = centre_of(replace(scene, place=place, dx=0, dy=0), extent)
        return float(np.hypot(seen.x - x / 2, seen.y - y / 2))

    return min(PLACES, key=distance) == scene.place


def from_picture(demo: Demo, count: int) -> Tally:
    """Another colour for what is on the picture, half way from the noise: where and how large it is stays."""
    tally, random = Tally("flux-dev, image-to-image at 0.75"), Random(2)
    for n in range(count):
        scene = random_scene(random, test=True)
        before = picture_of(scene)
        with saved(before) as file:
            after = demo.image(describe(scene, random, whole=True)[0], n, images=(file,), strength=0.75)
        compare(tally, look(np.asarray(before)), look(after), scene, changed=None)
    return tally


def kontext(demo: Demo, count: int) -> Tally:
    tally, random = Tally("flux-kontext, edits"), Random(3)
    for n in range(count):
        scene = random_scene(random)
        name, target = edited(scene, random, test=True)
        before = picture_of(scene)
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


def picture_of(scene: Scene, side: int = 256) -> Image.Image:
    return Image.fromarray(((draw(scene, side, side).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


@contextmanager
def saved(picture: Image.Image) -> Iterator[Path]:
    """A picture in a file for as long as the block lasts."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        picture.save(file.name)
        yield Path(file.name)


# Clips


def score_video(name: str, count: int = PROMPTS) -> Iterable[Tally]:
    demo = Demo(name, Residency("cpu"))
    yield moves(demo, count, f"{name}, text-to-video")
    yield goes_on_from_picture(demo, count // 4, f"{name}, image-to-video")
    yield goes_on(demo, count // 4, f"{name}, extend")


def moves(demo: Demo, count: int, title: str) -> Tally:
    tally, random = Tally(title), Random(4)
    for n in range(count):
        scene = random_moving(random, test=True)
        frames = demo.clip(describe(replace(scene, place="center"), random, whole=True)[0], n)
        add_clip(tally, frames, scene)
    return tally


def add_clip(tally: Tally, frames: np.ndarray, scene: Scene) -> None:
    seen = look(frames[len(frames) // 2])
    tally.add("background colour", seen is not None and seen.background == scene.background)
    tally.add("shape colour", seen is not None and seen.colour == scene.colour)
    tally.add("shape class", seen is not None and seen.shape == scene.shape)
    tally.add("moves as asked", direction_of(frames) == scene.direction)


def direction_of(frames: np.ndarray) -> str | None:
    """Which way the shape goes in the first half of the clip, before it may turn back at an edge."""
    first, later = look(frames[0]), look(frames[len(frames) // 2])
    if first is None or later is None:
        return None
    x, y = later.x - first.x, later.y - first.y
    if max(abs(x), abs(y)) < 0.03:
        return None
    along = (1 if x > 0 else -1, 0) if abs(x) > abs(y) else (0, 1 if y > 0 else -1)
    return next(name for name, way in DIRECTIONS.items() if way == along)


def goes_on_from_picture(demo: Demo, count: int, title: str) -> Tally:
    tally, random = Tally(title), Random(5)
    side = demo.model.sizes["1:1"][0]
    for n in range(count):
        scene = replace(random_moving(random, test=True), place="center", size="small")
        with saved(picture_of(scene, side)) as file:
            frames = demo.clip(describe(scene, random, whole=True)[0], n, ImageToVideo, images=(file,))
        add_clip(tally, frames, scene)
        first, asked = look(frames[0]), look(np.asarray(picture_of(scene, side)))
        there = first is not None and asked is not None and np.hypot(first.x - asked.x, first.y - asked.y) < KEPT
        tally.add("begins with the picture", bool(there))
    return tally


def goes_on(demo: Demo, count: int, title: str) -> Tally:
    """A clip of its own, extended without a word about where it goes."""
    tally, random = Tally(title), Random(6)
    for n in range(count):
        scene = replace(random_moving(random, test=True), size="small")
        said = replace(scene, place="center")
        before = demo.clip(describe(said, random, whole=True)[0], n)
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            Clip(before, demo.model.frames.fps[0], None).save(Path(file.name), lambda *_: None)
            prompt = describe(replace(said, direction="none"), random, whole=True)[0]
            after = demo.clip(prompt, n, ExtendVideo, video=Path(file.name))
        steps = [distance(one, other) for one, other in zip(before[-9:-1], before[-8:], strict=True)]
        join = distance(before[-1], after[0])
        tally.add("no jump at the join", join < 3 * max(float(np.median(steps)), 0.01))
        tally.add("same shape and colours", kept(look(before[-1]), look(after[len(after) // 2])))
    return tally


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between the shapes' centres; 1 where there is none."""
    seen, later = look(one), look(other)
    return float(np.hypot(seen.x - later.x, seen.y - later.y)) if seen and later else 1.0


def kept(before: Seen | None, after: Seen | None) -> bool:
    if before is None or after is None:
        return False
    return (before.background, before.colour, before.shape) == (after.background, after.colour, after.shape)


SCORES: dict[str, Callable[[int], Iterable[Tally]]] = {
    "flux": score_flux,
    "ltx": lambda count: score_video("ltx-video", count),
}
