"""Flux, with prompts that make a run fail: `only MODE`, `never` (out of memory), `die FLAG` (killed), `nan`."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from pipelines import flux
from pipelines.base import OnStep, Weights
from pipelines.params import TextToImage


def build(weights: Weights, residency: Any) -> "Hungry":
    return Hungry(weights, residency)


loader = flux.loader


class Hungry:
    def __init__(self, weights: Weights, residency: Any) -> None:
        self.flux, self.residency = flux.build(weights, residency), residency
        self.transformer = weights.component("transformer")

    def generate(self, params: TextToImage, on_step: OnStep) -> Any:
        word, _, argument = params.prompt.partition(" ")
        if word == "die" and not Path(argument).exists():
            Path(argument).touch()
            self.residency.acquire(self.transformer, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        if word == "nan":
            return self.spoiled(params, on_step)

        def step(phase: str, number: int, steps: int) -> None:
            on_step(phase, number, steps)
            if phase == "denoise" and (word == "never" or (word == "only" and self.residency.mode.name != argument)):
                raise torch.OutOfMemoryError("at will")

        return self.flux.generate(params, step)

    def spoiled(self, params: TextToImage, on_step: OnStep) -> Any:
        """With a VAE that outputs NaN, and is restored afterwards."""
        vae = self.flux._acquire("vae")
        bias = vae.decoder.conv_out.bias
        kept = bias.data.clone()
        bias.data.fill_(float("nan"))
        try:
            return self.flux.generate(params, on_step)
        finally:
            bias.data.copy_(kept)
