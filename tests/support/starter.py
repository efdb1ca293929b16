"""The starter weights: real, small, and fetched by `scripts/test` before the tests run."""

from pathlib import Path

from pipelines.base import Component, Weights

WEIGHTS = Path(__file__).parents[2] / "data" / "weights"


def starter(model: str) -> Path:
    """The one file of a starter model, such as `u2netp`."""
    files = [path for path in sorted((WEIGHTS / model).glob(f"{model}.*")) if path.suffix in (".onnx", ".safetensors")]
    assert files, f"the starter weights of {model} are not in {WEIGHTS}: run scripts/test, or `plantain pull {model}`"
    return files[0]


def single_file(model: str, family: str, path: Path) -> Weights:
    """Weights of a model that is one file, as the catalogue gives them."""
    component = Component("network", f"key of {path}", path.stat().st_size, path)
    return Weights(model, family, path.parent, (component,))
