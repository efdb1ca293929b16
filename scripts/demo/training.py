"""The training loop of every network of the demo: Muon and AdamW, warm-up, cosine decay, an average of the weights."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WARM_UP = 100
FURTHER_RATE = 1.5e-3
"""At the start of what is trained further. At 5e-3, eight hundred steps of LTX undid more than they brought."""
DECAY = 0.998
"""Of the averaged weights, per step: they remember about 500 steps."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fastest() -> torch.dtype:
    """bfloat16, but for a CPU without instructions for it: there it takes twice as long as float32."""
    has = torch.cpu.get_capabilities()
    native = device().type == "cuda" or has.get("avx512_bf16") or has.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def learn(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    rate: float,
    folder: Path,
    dtype: torch.dtype | None = None,
    muon: bool = False,
) -> nn.Module:
    """Train `model` for `steps` of `loss_of(step)` and return its averaged weights, in evaluation mode.

    `dtype` is what is computed in where that is safe, else the fastest here; the weights are float32. `muon` is for
    transformers.
    What was done is kept in `folder / name.pt`, and a run that was broken off goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = Optimiser(model, rate, muon)
    dtype = dtype or fastest()
    kept = folder / f"{name}.pt"
    begin = restore(kept, model, average, optimiser) if kept.exists() else 0
    started, recent = time.monotonic(), 0.0
    for step in range(begin, steps):
        torch.manual_seed(step)
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(step)
        loss.backward()
        optimiser.step(min(1, (step + 1) / WARM_UP) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2))
        follow(average, model, min(DECAY, (1 + step) / (10 + step)))
        recent = float(loss.detach()) if step == begin else 0.98 * recent + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - begin)
            print(f"{name} {step + 1}/{steps} loss {recent:.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            keep(kept, model, average, optimiser, step + 1)
    return average


class Optimiser:
    """Muon for the matrices and kernels of a network's blocks, AdamW for the rest.

    Muon (Keller Jordan, 2024) makes each step's matrix near orthogonal. Of the demo's Flux, it brings the loss in a
    quarter of the steps to where AdamW alone brings it. A kernel counts as a matrix with a row for each output.
    """

    def __init__(self, model: nn.Module, rate: float, muon: bool) -> None:
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.learning = [weight for _, weight in named]
        inner = [weight for name, weight in named if muon and "block" in name and weight.ndim > 1]
        self.matrices = [(weight, nn.Parameter(weight.data.flatten(1))) for weight in inner]
        others = [weight for weight in self.learning if all(weight is not one for one in inner)]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)]
        if inner:
            flat = [matrix for _, matrix in self.matrices]
            self.parts.append(torch.optim.Muon(flat, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.rate = rate

    def step(self, share: float) -> None:
        """At `share` of the rate; the gradients are used up."""
        nn.utils.clip_grad_norm_(self.learning, 1.0)
        for weight, matrix in self.matrices:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * share
            part.step()
        for weight in self.learning:
            weight.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, its in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


def keep(file: Path, model: nn.Module, average: nn.Module, optimiser: Optimiser, step: int) -> None:
    state = {"model": model.state_dict(), "average": average.state_dict(),
             "optimiser": optimiser.state_dict(), "step": step}  # fmt: skip
    torch.save(state, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def restore(file: Path, model: nn.Module, average: nn.Module, optimiser: Optimiser) -> int:
    """The steps that were done."""
    state = torch.load(file, weights_only=True, map_location=device())
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
