"""Prices: of a job in credits, and of the same job at fal.ai in US dollars."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.catalog.catalog import Model
from server.settings import SettingsError


class PricesError(SettingsError):
    """`fal-prices.toml` is invalid."""


def price_of(model: Model, params: Mapping[str, Any]) -> int:
    """Credits for one job with these params (camelCase JSON), by the table in `weights.toml`, rounded up."""
    credits = model.credits
    price = credits.base + credits.per_second * params.get("duration", 0)
    return math.ceil(price * credits.resolutions.get(params.get("resolution", ""), 1))


@dataclass(frozen=True)
class FalPrice:
    """US dollars: per call, per second of video, per million pixels of the output."""

    per_call: float = 0.0
    per_second: float = 0.0
    per_megapixel: float = 0.0

    def of(self, calls: int, seconds: float, pixels: int) -> float:
        return self.per_call * calls + self.per_second * seconds + self.per_megapixel * pixels / 1e6


def fal_prices(path: Path) -> dict[str, FalPrice]:
    """Prices by model, from the operator's table; empty without one. fal's prices change, so none are built in.

    Raises PricesError.
    """
    if not path.exists():
        return {}
    try:
        return {name: _fal_price(name, table) for name, table in tomllib.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError) as error:
        raise PricesError(f"{path}: {error}") from error


def _fal_price(name: str, table: Any) -> FalPrice:
    known = FalPrice.__dataclass_fields__.keys()
    numbers = isinstance(table, dict) and all(type(value) in (int, float) and value >= 0 for value in table.values())
    if not numbers or table.keys() - known:
        raise PricesError(f"[{name}] may hold {', '.join(known)}, in dollars")
    return FalPrice(**table)
