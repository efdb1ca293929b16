"""How far a run has come, from diffusers' pipelines to whoever wants to know."""

from collections.abc import Callable
from typing import Any

from pipelines.base import OnStep


def report_steps(on_step: OnStep) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A `callback_on_step_end`. What `on_step` raises ends the run."""

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step("denoise", step + 1, pipe.num_timesteps)
        return tensors

    return report
