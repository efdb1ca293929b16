"""How long the demo takes through a server on this machine: a picture (aim 1 s), and a clip of two seconds (aim 10 s).

The weights that come with the program, at their own sizes and steps, each model's first call apart: its worker loads
them then.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.demo.evaluation import picture_of
from scripts.demo.scenes import Scene, draw_still
from server.settings import Settings
from tests.support.server import GENERATE, LiveServer, data_url, running

PROMPT = "a large red circle on a blue background"
VIDEO = "/api/video/fal/generate"


def calls() -> dict[str, tuple[str, dict[str, Any], float]]:
    """By what it is: the route, the body, and the aim in seconds."""
    picture = data_url(picture_of(draw_still(Scene(background="blue"), 256, 256)))
    edit = {"model": "flux-kontext", "prompt": "make the circle green", "imageUrl": picture}
    clip = {"prompt": PROMPT.replace(" on", " moving right on"), "duration": 2}
    return {
        "flux-schnell, 256 x 256": (GENERATE, {"model": "flux-schnell", "prompt": PROMPT}, 1.0),
        "flux-kontext, an edit": (GENERATE, edit, 1.0),
        "ltx-video, 224 x 128, 2 s": (VIDEO, clip | {"model": "ltx-video"}, 10.0),
        "wan-2.1, 224 x 128, 2 s": (VIDEO, clip | {"model": "wan-2.1"}, 10.0),
    }


def took_s(live_server: LiveServer, route: str, body: dict[str, Any], seed: int) -> float:
    start = time.perf_counter()
    answer = live_server.ask(route, body | {"seed": seed})
    answer.raise_for_status()
    if answer.headers["x-weights"] != "demo":
        raise SystemExit(f"{body['model']} did not run on demo weights")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10, help="after the first one, of each")
    count = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as data, running(replace(Settings(), data=Path(data))) as live_server:
        live_server.until(lambda: live_server.client.get("/readyz").is_success)
        for name, (route, body, aim_s) in calls().items():
            first_s, *later_s = (took_s(live_server, route, body, seed) for seed in range(count + 1))
            middle_s = statistics.median(later_s)
            print(f"{name:<26} {middle_s:5.2f} s, {middle_s / aim_s:.2f} of the aim ({aim_s:.0f} s); "
                  f"slowest {max(later_s):.2f} s, first call {first_s:.2f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
