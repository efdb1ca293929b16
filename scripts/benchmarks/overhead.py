"""What the server adds to a bare pipeline call: HTTP, queue, worker process, PNG and database.

Pairs of one picture of tiny Flux weights: the pipeline called straight in this process, then the same through a real
socket. Prints the median difference, and as a share of a one-second job. One thread each, here and in the worker: what
more threads gain on a network this small is noise.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from pipelines import flux
from pipelines.catalog.reader import load_catalog
from pipelines.params import TextToImage
from pipelines.residency.residency import Residency
from pipelines.weights.installed import Installed
from tests.support.server import GENERATE, LiveServer, install_test_models, running

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; the worker inherits it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        settings = install_test_models(Path(folder))
        model = load_catalog(settings.weights_toml).models["flux-schnell"]
        weights = Installed(settings.weights).weights(model)
        assert weights
        pipeline = flux.build(weights, Residency("cpu"))
        with running(settings) as live_server:
            live_server.until(lambda: live_server.client.get("/readyz").is_success)
            for seed in range(3):
                bare_s(pipeline, seed), served_s(live_server, seed)
            times = [(bare_s(pipeline, seed), served_s(live_server, seed)) for seed in range(pairs)]
    report(times)


def bare_s(pipeline: flux.Flux, seed: int) -> float:
    params = TextToImage(prompt="a red circle", width=64, height=64, seed=seed, num_inference_steps=2)
    start = time.perf_counter()
    pipeline.generate(params, lambda *_: None)
    return time.perf_counter() - start


def served_s(live_server: LiveServer, seed: int) -> float:
    start = time.perf_counter()
    answer = live_server.ask(GENERATE, {"prompt": "a red circle", "model": "flux-schnell", "seed": seed})
    answer.raise_for_status()
    return time.perf_counter() - start


def report(times: list[tuple[float, float]]) -> None:
    bare, served = (statistics.median(column) for column in zip(*times, strict=True))
    added = statistics.median(after - before for before, after in times)
    print(f"bare pipeline   {bare * 1000:7.1f} ms (median of {len(times)})")
    print(f"through server  {served * 1000:7.1f} ms, {served / bare:.2f} times the bare call")
    print(f"added           {added * 1000:7.1f} ms (median of the pairs' differences; aim 15 ms)")
    print(f"of a one-second job {added:.1%} (aim 5 %)")


if __name__ == "__main__":
    main()
