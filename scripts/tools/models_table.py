#!/usr/bin/env python
"""Generates docs/models.md from weights.toml. tests/test_models_table.py compares the two."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.catalog.catalog import Catalog, Model
from pipelines.catalog.endpoints import Endpoint
from pipelines.catalog.reader import load_catalog

GIB = 2**30

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"

INTRO = """# Models

```sh
plantain models                        # every model: where it runs, which weights are installed
plantain models --memory               # memory per phase: estimated, measured, expected
plantain pull flux-schnell             # download, check every hash, record in weights.lock; resumes when repeated
plantain pull flux-dev --accept-licence
plantain verify                        # read all installed weights and compare their hashes
plantain import /media/disk            # install from a folder, without a network
```

Weights whose licence forbids commercial use need `--accept-licence` once. Gated repositories need `HF_TOKEN`;
`HF_ENDPOINT` sets a mirror. Only safetensors and ONNX files are loaded, and a GGUF file if `weights.toml` names it. To
add a model, see [CONTRIBUTING.md](../CONTRIBUTING.md#add-a-model).

This page is generated from `weights.toml` by `scripts/tools/models_table.py`; do not edit it.

- **Runs** is `here` (on your own device, after `plantain pull MODEL`), `fal` (see [remote.md](remote.md)) or both.
  A retired model is still requested at fal, and fails with `ENDPOINT_GONE` once fal has removed it.
- **Credits** is the price of a request; for video, per request and per second.
- **VRAM** is all weights plus the working memory of a run at the first size listed, all components resident. Smaller
  devices run the model staged or streamed, see [memory.md](memory.md).
"""

DEMO = """
## Demo weights

Sizes and lengths of models that are not installed and run on demo weights, see [demo.md](demo.md).
"""

REMOTE = """
## At fal.ai

The endpoint and the parameters of each workflow. If a cell is empty, the endpoint chooses.
"""


def page(catalog: Catalog) -> str:
    models = catalog.models.values()
    here = table(
        ("model", "runs", "workflows", "sizes", "seconds", "credits", "licence", "VRAM"),
        (row_of(model) for model in models),
    )
    there = table(
        ("model", "workflow", "endpoint", "shapes", "seconds", "also takes"),
        (row for model in models for row in remote_rows(catalog, model)),
    )
    demo = table(("model", "sizes", "seconds"), (demo_row(model.demo) for model in models if model.demo))
    return f"{INTRO}\n{here}{DEMO}\n{demo}{REMOTE}\n{there}"


def demo_row(demo: Model) -> Sequence[str]:
    return f"`{demo.stands_for}`", sizes(demo), seconds_here(demo)


def row_of(model: Model) -> Sequence[str]:
    runs = {"local": "here", "fal": "fal", "both": "here, fal"}[model.runs_on]
    if model.retired:
        runs += f" (retired {model.retired.date})"
    return (
        f"`{model.id}`",
        runs,
        ", ".join(model.workflows),
        sizes(model),
        seconds_here(model),
        price(model),
        model.licence + (", non-commercial" if model.non_commercial else ""),
        vram(model),
    )


def sizes(model: Model) -> str:
    """The sizes that the model was trained for, by resolution."""
    if model.weights is None or not model.sizes:
        return ""
    every = model.resolutions or {"": model.sizes}
    return "; ".join(f"{name}{': ' if name else ''}{listed(sizes.values())}" for name, sizes in every.items())


def listed(sizes: Iterable[tuple[int, int]]) -> str:
    return " ".join(f"{width}x{height}" for width, height in sizes)


def seconds_here(model: Model) -> str:
    """The longest clip at the default frame rate."""
    if model.frames is None or model.weights is None:
        return ""
    fps = int(model.defaults.get("fps", model.frames.fps[0]))
    return f"up to {model.frames.max / fps:.1f} at {fps} fps"


def price(model: Model) -> str:
    text = str(model.credits.base)
    if model.credits.per_second:
        text += f" + {model.credits.per_second} a second"
    for resolution, factor in model.credits.resolutions.items():
        text += f"; {resolution} x{factor:g}"
    return text


def vram(model: Model) -> str:
    if model.weights is None:
        return ""
    weights_gib = model.weights_gib
    if weights_gib is None:
        weights_gib = (model.weights.size_bytes or 0) / GIB
    return f"{weights_gib + working_bytes(model) / GIB:.1f} GiB"


def working_bytes(model: Model) -> int:
    """Bytes at the first size and the default length; for an upscaler, for an output of one megapixel."""
    width, height = next(iter(model.sizes.values()), (1024, 1024))
    frames = 1
    if model.frames:
        wanted = float(model.defaults.get("duration", 0)) * int(model.defaults.get("fps", model.frames.fps[0])) + 1
        frames = min(int(wanted), model.frames.max)
    working = model.working
    if working.phases:
        return max(phase.bytes_for(width * height, frames) for phase in working.phases)
    return working.fixed_bytes + working.bytes_per_pixel * width * height


def remote_rows(catalog: Catalog, model: Model) -> Iterable[Sequence[str]]:
    for workflow, name in model.remote.items():
        endpoint = catalog.endpoint(name)
        yield f"`{model.id}`", workflow, places(endpoint), shapes(endpoint), lengths(endpoint), also(endpoint)


def places(endpoint: Endpoint) -> str:
    return f"`{endpoint.id}`" + (f"; several images: `{endpoint.several}`" if endpoint.several else "")


def shapes(endpoint: Endpoint) -> str:
    if endpoint.size is None:
        return ""
    return " ".join(shape(ratio, value) for ratio, value in endpoint.size.values.items())


def shape(ratio: str, value: Any) -> str:
    """The ratio, with the pixels if the endpoint takes pixels."""
    pixels = "{width}x{height}".format(**value) if isinstance(value, dict) else str(value)
    return f"{ratio} ({pixels})" if pixels[0].isdigit() and pixels != ratio else ratio


def lengths(endpoint: Endpoint) -> str:
    seconds = endpoint.duration.seconds if endpoint.duration else ()
    if len(seconds) > 4 and seconds == tuple(range(seconds[0], seconds[-1] + 1)):
        return f"{seconds[0]} to {seconds[-1]}"
    return ", ".join(map(str, seconds))


def also(endpoint: Endpoint) -> str:
    words = []
    for name in endpoint.takes:
        if name != "prompt":
            choices = endpoint.choices.get(name)
            words.append(f"`{camel(name)}`" + (f" ({', '.join(map(str, choices))})" if choices else ""))
    if endpoint.holds_images > 1:
        words.append(f"up to {endpoint.holds_images} images")
    return ", ".join(words)


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    DOCS.write_text(page(load_catalog()), "utf-8")
