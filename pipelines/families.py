"""Family modules by name. Each has `build(weights, residency)` and `loader(weights, device)`."""

import importlib
from typing import Any


def family_module(family: str) -> Any:
    """`flux` → `pipelines.flux`; a dotted name is a family of one's own."""
    return importlib.import_module(family if "." in family else f"pipelines.{family}")
