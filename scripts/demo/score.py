"""How well the demo does what it is asked: prompts it was never trained on, through the server's own pipelines."""

from collections.abc import Callable, Iterable

from scripts.demo.score_clips import score_video
from scripts.demo.score_pictures import score_flux
from scripts.demo.trial import Tally

SCORES: dict[str, Callable[[int], Iterable[Tally]]] = {
    "flux": score_flux,
    "ltx": lambda count: score_video("ltx-video", count),
    "wan": lambda count: score_video("wan-2.1-vace-1.3b", count),
}
