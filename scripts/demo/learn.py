"""The training loop of every network of the demo: AdamW, warm-up and cosine decay, and an average of the weights."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

WARM_UP = 100
DECAY = 0.998
"""Of the averaged weights, per step: they remember about 500 steps."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learn(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    rate: float,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Train `model` for `steps` of `loss_of(step)` and return its averaged weights, in evaluation mode.

    `dtype` is what is computed in where that is safe; the weights are float32.
    What was done is kept in `folder / name.pt`, and a run that was broken off goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    kept = folder / f"{name}.pt"
    begin = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True, map_location=device())
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        begin = state["step"]
    started, recent = time.monotonic(), 0.0
    for step in range(begin, steps):
        for group in optimiser.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / WARM_UP) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            )
        torch.manual_seed(step)
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            for mine, its in zip(average.buffers(), model.buffers(), strict=True):
                mine.copy_(its)
        recent = float(loss.detach()) if step == begin else 0.98 * recent + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - begin)
            print(f"{name} {step + 1}/{steps} loss {recent:.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "average": average.state_dict(),
                     "optimiser": optimiser.state_dict(), "step": step + 1}  # fmt: skip
            torch.save(state, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
    return average
