"""Clips that do what the prompt says: the shipped demo weights through a server, looked at by analysis."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from scripts.demo.evaluate_videos import direction_of, distance
from scripts.demo.evaluation import KEPT, picture_of
from scripts.demo.image_analysis import look
from scripts.demo.motion import SPEED, draw_clip
from scripts.demo.scenes import Scene
from server.settings import PROJECT, Settings
from tests.support.demo import write_catalogue
from tests.support.server import LiveServer, data_url, running

GENERATE = "/api/video/fal/generate"
SECONDS = {"ltx-video": 2, "wan-2.1": 1}
pytestmark = pytest.mark.parametrize("model", SECONDS)


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With the catalogue that is shipped, but for Wan's dtype, and nothing installed."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "weights").symlink_to(PROJECT / "weights")
    with running(replace(Settings(), data=folder / "data", weights_toml=write_catalogue(folder))) as it:
        it.until(lambda: it.client.get("/readyz").is_success)
        yield it


def made(live_server: LiveServer, model: str, prompt: str, **more: Any) -> tuple[str, np.ndarray]:
    """Its URL, and its frames (count, height, width, 3)."""
    body = {"prompt": prompt, "model": model, "seed": 3, "aspectRatio": "1:1", "duration": SECONDS[model]} | more
    answer = live_server.ask(GENERATE, body)
    assert answer.status_code == 200 and answer.headers["x-weights"] == "demo", answer.text
    url = answer.json()["videoUrl"]
    return url, frames_of(live_server.services.files.root / url.rpartition("/")[2])


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.mark.parametrize(
    "way", ["left", "up", *(pytest.param(way, marks=pytest.mark.slow) for way in ("right", "down"))]
)
def test_it_moves_as_asked(live_server: LiveServer, model: str, way: str):
    _, frames = made(live_server, model, f"a large red circle moving {way} on a blue background")
    seen = look(frames[len(frames) // 2])
    assert seen and (seen.colour, seen.background) == ("red", "blue")
    assert direction_of(frames) == way


def test_it_begins_with_the_picture(live_server: LiveServer, model: str):
    scene = Scene("circle", "red", "medium", "center", "white")
    picture = picture_of(draw_clip(scene, 128, 128, 1)[:, 0])
    _, frames = made(live_server, model, "a red circle moving left on a white background", imageUrl=data_url(picture))
    first, asked = look(frames[0]), look(np.asarray(picture))
    assert first and asked and np.hypot(first.x - asked.x, first.y - asked.y) < KEPT
    assert direction_of(frames) == "left"


@pytest.mark.parametrize("more", [{}, pytest.param({"duration": 2}, marks=pytest.mark.slow)], ids=["short", "long"])
def test_extended_it_goes_on_without_a_jump(live_server: LiveServer, model: str, more: dict[str, Any]):
    url, before = made(live_server, model, "a small red circle moving right on a white background", **more)
    _, both = made(live_server, model, "a small red circle on a white background", videoUrl=url, **more)
    assert len(both) > len(before)
    around = range(len(before) - 3, len(before) + 3)
    steps = [distance(both[n], both[n + 1]) for n in around]
    assert max(steps) < 4 * SPEED / 128
    assert abs(distance(both[len(before) - 1], both[-1])) > 0.05, "it moves on"
