#!/usr/bin/env python
"""Train the demo weights, or score them with --score: .venv/bin/python scripts/demo/train.py [FAMILY ...]."""

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.demo.flux import train_flux, train_flux_further
from scripts.demo.ltx import train_ltx, train_ltx_further
from scripts.demo.wan import train_wan, train_wan_further

sys.path.insert(0, str(ROOT := Path(__file__).parents[2]))

TRAINERS: dict[str, Callable[[Path], Any]] = {"flux": train_flux, "ltx": train_ltx, "wan": train_wan}
FURTHER: dict[str, Callable[[Path, int, Path], Any]] = {
    "flux": train_flux_further,
    "ltx": train_ltx_further,
    "wan": train_wan_further,
}


def train(family: str, work: Path, out: Path) -> None:
    """Into `out / family`, in bfloat16 and diffusers' layout. What is trained already lies in `work`."""
    pipeline = TRAINERS[family](work)
    pipeline.to(torch.bfloat16)
    shutil.rmtree(out / family, ignore_errors=True)
    pipeline.save_pretrained(out / family)
    subprocess.run([ROOT / "scripts/sums", out], check=True)
    size = sum(file.stat().st_size for file in (out / family).rglob("*") if file.is_file())
    print(f"{out / family}: {size / 2**20:.1f} MiB", flush=True)


def train_further(family: str, steps: int, work: Path, out: Path) -> None:
    """The transformer in `out / family` is replaced, and all else is as it was."""
    transformer = FURTHER[family](out / family, steps, work).transformer.to(torch.bfloat16)
    folder = out / family / "transformer"
    shutil.rmtree(folder)
    transformer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it came from is nobody else's concern
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    subprocess.run([ROOT / "scripts/sums", out], check=True)
    (work / family / f"{family}_further.pt").unlink()  # the next one begins with what was written now


def score(family: str, count: int) -> None:
    from scripts.demo.score import SCORES

    for tally in SCORES[family](count):
        print(*tally.lines(), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(TRAINERS)}; else all")
    parser.add_argument("--score", action="store_true", help="score weights/demo, through the server's own pipelines")
    parser.add_argument("--prompts", type=int, default=200, help="how many to score, of each kind")
    parser.add_argument("--further", type=int, metavar="STEPS", help="only train the transformer in --out that far on")
    parser.add_argument("--work", type=Path, default=ROOT / "build/demo", help="where training is kept, and goes on")
    parser.add_argument("--out", type=Path, default=ROOT / "weights/demo")
    parser.add_argument("--threads", type=int, help="for torch; else as many as there are cores")
    given = parser.parse_args()
    if unknown := set(given.families) - set(TRAINERS):
        parser.error(f"no family {', '.join(unknown)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    for family in given.families or TRAINERS:
        if given.score:
            score(family, given.prompts)
        elif given.further:
            train_further(family, given.further, given.work, given.out)
        else:
            train(family, given.work, given.out)


if __name__ == "__main__":
    main()
