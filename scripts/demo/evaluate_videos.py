"""A video model's scores: clips from words, from a picture, and where a clip goes on."""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoModel

from pipelines.media.video_writer import VideoOutput
from pipelines.params import ExtendVideo, ImageToVideo
from pipelines.residency.residency import Residency
from scripts.demo.evaluation import KEPT, PROMPTS, Demo, Tally, picture_of, saved
from scripts.demo.image_analysis import Seen, look
from scripts.demo.motion import draw_clip, random_moving
from scripts.demo.prompts import describe
from scripts.demo.scenes import DIRECTIONS, Scene


def score_video(name: str, count: int = PROMPTS) -> Iterable[Tally]:
    demo = Demo(name, Residency("cpu"))
    yield moves(demo, count, f"{name}, text-to-video")
    yield goes_on_from_picture(demo, count // 4, f"{name}, image-to-video")
    yield goes_on(demo, count // 4, f"{name}, extend")
    yield through_vae(demo, count // 4, f"{name}, VAE alone")


def moves(demo: Demo, count: int, title: str) -> Tally:
    tally, random = Tally(title), Random(4)
    for n in range(count):
        scene = random_moving(random, test=True)
        frames = demo.clip(describe(scene, random, whole=True)[0], n)
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
    width, height = demo.model.sizes["1:1"]
    for n in range(count):
        scene = replace(random_moving(random, test=True), size="small")
        picture = picture_of(draw_clip(replace(scene, direction="none"), width, height, 1)[:, 0])
        with saved(picture) as file:
            frames = demo.clip(describe(scene, random, whole=True)[0], n, ImageToVideo, images=(file,))
        add_clip(tally, frames, scene)
        first, asked = look(frames[0]), look(np.asarray(picture))
        there = first is not None and asked is not None and np.hypot(first.x - asked.x, first.y - asked.y) < KEPT
        tally.add("begins with the picture", bool(there))
    return tally


def goes_on(demo: Demo, count: int, title: str) -> Tally:
    """A clip of its own, extended without a word about where it goes."""
    tally, random = Tally(title), Random(6)
    for n in range(count):
        scene = replace(random_moving(random, test=True), size="small")
        before = demo.clip(describe(scene, random, whole=True)[0], n)
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            VideoOutput(before, demo.model.defaults["fps"], None).save(Path(file.name), lambda *_: None)
            prompt = describe(replace(scene, direction="none"), random, whole=True)[0]
            after = demo.clip(prompt, n, ExtendVideo, video=Path(file.name))
        steps = [distance(one, other) for one, other in zip(before[-9:-1], before[-8:], strict=True)]
        join = distance(before[-1], after[0])
        tally.add("no jump at the join", join < 3 * max(float(np.median(steps)), 0.01))
        tally.add("same shape and colours", kept(look(before[-1]), look(after[len(after) // 2])))
    return tally


@torch.no_grad()
def through_vae(demo: Demo, count: int, title: str) -> Tally:
    """Clips as they should be, encoded and decoded again: no transformer on these latents does better."""
    vae = AutoModel.from_pretrained(str(demo.weights.component("vae").path), dtype=torch.float32)
    width, height = demo.model.sizes["1:1"]
    tally, random = Tally(title), Random(7)
    for _ in range(count):
        scene = random_moving(random, test=True)
        clip = draw_clip(scene, width, height, 25)[None]
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample[0]
        for n in (0, 12):
            seen = look(np.asarray(picture_of(decoded[:, n].clamp(-1, 1))))
            tally.add(
                f"{scene.size} shape, {f'frame {n}' if n else 'first frame'}", bool(seen and seen.shape == scene.shape)
            )
    return tally


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between the shapes' centres; 1 where there is none."""
    seen, later = look(one), look(other)
    return float(np.hypot(seen.x - later.x, seen.y - later.y)) if seen and later else 1.0


def kept(before: Seen | None, after: Seen | None) -> bool:
    if before is None or after is None:
        return False
    return (before.background, before.colour, before.shape) == (after.background, after.colour, after.shape)
