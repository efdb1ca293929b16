"""How well the demo does what it is asked: prompts it was never trained on, through the server's own pipelines."""

from collections.abc import Callable, Iterable

from scripts.demo.evaluate_images import score_flux
from scripts.demo.evaluate_videos import score_video
from scripts.demo.evaluation import Tally

SCORES: dict[str, Callable[[int], Iterable[Tally]]] = {
    "flux": score_flux,
    "ltx": lambda count: score_video("ltx-video", count),
    "wan": lambda count: score_video("wan-2.1-vace-1.3b", count),
}
