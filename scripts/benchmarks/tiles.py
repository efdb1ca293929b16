"""Figures of the upscalers on this machine's CPU: seams against an untiled run, CPU seconds, peak memory.

.venv/bin/python -m scripts.benchmarks.tiles [MODEL ...]           a 451 x 300 photo
.venv/bin/python -m scripts.benchmarks.tiles --large [MODEL ...]   a 4,000 x 3,000 one, four times larger
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

from pipelines import realesrgan
from pipelines.realesrgan import Network, load, upscale
from tests.support.starter import single_file, starter

MODELS = ("realesr-animevideov3", "realesrgan-x4plus-anime", "realesrgan-x4plus")
SEAMS_WINDOW = 1000
"""Far smaller windows than in use: six tiles of the small photo, so that there are seams to find."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    for model in given.models:
        network = load(single_file(model, "realesrgan", starter(model)).component("network"))
        if given.large:
            measure(network, f"{model} 4000x3000", Image.fromarray(data.chelsea()).resize((4000, 3000)), 4)
        else:
            bench(network, model, Image.fromarray(data.chelsea()))


def bench(network: Network, model: str, photo: Image.Image) -> None:
    measure(network, f"{model} 451x300", photo, 2)
    whole = measure(network, f"{model} 451x300", photo, 4)
    in_use, realesrgan.WINDOW["cpu"] = realesrgan.WINDOW["cpu"], SEAMS_WINDOW
    tiled = measure(network, f"{model} 451x300 in windows of {SEAMS_WINDOW}", photo, 4)
    realesrgan.WINDOW["cpu"] = in_use
    difference = np.asarray(tiled).astype(float) - np.asarray(whole)
    psnr = 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9))
    print(
        f"{model} seams: context {network.context}, at most {np.abs(difference).max():.0f} of 255, PSNR {psnr:.1f} dB"
    )


def measure(network: Network, name: str, photo: Image.Image, scale: int) -> Image.Image:
    tiles: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before_bytes, started_at = memory_bytes("VmRSS"), time.process_time()
    enlarged = upscale(network, photo, scale, lambda phase, step, steps: tiles.append(step))
    took_s, held_bytes = time.process_time() - started_at, memory_bytes("VmHWM") - before_bytes
    output_bytes = enlarged.width * enlarged.height * 4
    print(
        f"{name} x{scale}: {took_s:.1f} CPU seconds on {torch.get_num_threads()} threads, {len(tiles)} tiles, "
        f"{held_bytes / 2**20:.0f} MiB more than before, of which {output_bytes / 2**20:.0f} MiB output",
        flush=True,
    )
    return enlarged


def memory_bytes(name: str) -> int:
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


if __name__ == "__main__":
    main()
