"""A test family controlled by the prompt: it works, raises, is killed, never ends, or runs out of memory."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.base import InvalidInput, Loader, OnStep, Weights
from pipelines.params import TextToImage


def build(weights: Weights, residency: Any) -> "Wayward":
    return Wayward(weights, residency)


def loader(weights: Weights, device: Any) -> Loader:
    return Loader(lambda _: object(), returns_module=False)


class Wayward:
    def __init__(self, weights: Weights, residency: Any) -> None:
        self.weights, self.residency = weights, residency

    def generate(self, params: TextToImage, on_step: OnStep) -> Image.Image:
        for component in self.weights.components:
            self.residency.acquire(component, lambda _: object())
        word, _, argument = params.prompt.partition(" ")
        on_step("denoise", 0, 2)
        self.step = lambda: on_step("denoise", 1, 2)
        getattr(self, f"do_{word}")(argument)
        on_step("denoise", 2, 2)
        return Image.new("RGB", (params.width, params.height), (params.seed % 256, 0, 0))

    def do_work(self, _: str) -> None:
        pass

    def do_raise(self, text: str) -> None:
        raise RuntimeError(text)

    def do_refuse(self, text: str) -> None:
        raise InvalidInput(text)

    def do_run_out(self, _: str) -> None:
        raise MemoryError

    def do_out(self, flag: str) -> None:
        """Out of memory the first time."""
        if not Path(flag).exists():
            Path(flag).touch()
            raise MemoryError

    def do_die(self, _: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_exit(self, code: str) -> None:
        sys.exit(int(code))

    def do_die_once(self, flag: str) -> None:
        if not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def do_sleep(self, seconds: str) -> None:
        time.sleep(float(seconds))

    def do_wait(self, flag: str) -> None:
        """Reports steps until the flag file exists; can be cancelled at each one."""
        while not Path(flag).exists():
            time.sleep(0.01)
            self.step()
