"""A picture of what ran where: one lane a device, loads dark, runs in the colour of their model. Plain SVG."""

from collections.abc import Sequence
from html import escape

from server.scheduling.simulation import Run

WIDTH, LANE, LEFT, TOP = 1400, 46, 60, 40
COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"]


def svg(runs: Sequence[Run], devices: Sequence[str]) -> str:
    end_s = max(run.ends_at for run in runs)
    scale = (WIDTH - LEFT - 20) / end_s
    models = list(dict.fromkeys(model_of(run) for run in runs))
    height = TOP + LANE * len(devices) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for index, model in enumerate(models):
        x = LEFT + 130 * index
        parts.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 16}" y="22">{escape(model)}</text>')
    for row, device in enumerate(devices):
        parts.append(f'<text x="8" y="{TOP + LANE * row + 24}">{escape(device)}</text>')
    for run in runs:
        y = TOP + LANE * devices.index(run.device)
        colour = COLOURS[models.index(model_of(run)) % len(COLOURS)]
        parts.append(bar(run.starts_at, run.runs_at, y, "#222", scale, "load"))
        told = f"{run.job.job_id} of {run.job.user_id}, waited {run.waited_s:.1f} s"
        parts.append(bar(run.runs_at, run.ends_at, y, colour, scale, told))
    base = TOP + LANE * len(devices) + 14
    for tick in range(11):
        x = LEFT + end_s * tick / 10 * scale
        parts.append(f'<text x="{x:.0f}" y="{base + 10}" text-anchor="middle">{end_s * tick / 10:.0f} s</text>')
    parts.append(f'<text x="{LEFT}" y="{base + 32}">black: weights on their way to the device</text></svg>')
    return "\n".join(parts)


def bar(start_s: float, end_s: float, y: int, colour: str, scale: float, told: str) -> str:
    width = max(0.0, (end_s - start_s) * scale - 0.3)
    place = f'x="{LEFT + start_s * scale:.2f}" y="{y}" width="{width:.2f}" height="{LANE - 10}"'
    return f'<rect {place} fill="{colour}"><title>{escape(told)}</title></rect>'


def model_of(run: Run) -> str:
    """By the component that no other model has: the last one, of those with names for people."""
    return run.job.need.components[-1][0]
