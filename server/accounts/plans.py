"""The plans: how many requests a minute, how many jobs at once, and which share of the devices."""

import logging
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from server.errors import invalid_field
from server.settings import SettingsError

log = logging.getLogger("plantain.plans")

DEFAULTS = Path(__file__).with_name("plans.toml")
SIGN_UP_PLAN = "free"


class PlansError(SettingsError):
    """`plans.toml` says something that cannot be."""


@dataclass(frozen=True)
class Plan:
    """None is no limit. `weight` is the share of busy devices, against the other users that wait."""

    name: str
    requests_a_minute: int | None = None
    jobs_at_once: int | None = None
    weight: float = 1.0


UNLIMITED = Plan("unlimited")


class Plans(Mapping[str, Plan]):
    """By name, in the order of the files."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        self._plans = {plan.name: plan for plan in plans}

    def __getitem__(self, name: str) -> Plan:
        return self._plans[name]

    def __iter__(self) -> Any:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    @classmethod
    def load(cls, *paths: Path) -> "Plans":
        """The defaults, changed by each of `paths` that is there. Raises PlansError, with the path in front."""
        tables: dict[str, dict[str, Any]] = {}
        for path in (DEFAULTS, *paths):
            if path.exists():
                tables |= _tables(path)
        return cls(Plan(name, **table) for name, table in tables.items())

    def of(self, name: str) -> Plan:
        """A user's plan. One that an operator has since struck out counts as the plan of a sign-up."""
        if name not in self:
            log.warning("plan %r is in no plans.toml; its users have %r", name, SIGN_UP_PLAN)
        return self.get(name, self[SIGN_UP_PLAN])

    def known(self, name: str) -> str:
        """The name, if there is such a plan. Raises InvalidBody."""
        if name not in self:
            raise invalid_field("plan", f"there is no plan {name!r}; there are {', '.join(self)}")
        return name


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
        for name, table in tables.items():
            _check(name, table)
    except (OSError, ValueError) as error:
        raise PlansError(f"{path}: {error}") from error
    return tables


def _check(name: str, table: Any) -> None:
    keys = {field.name for field in fields(Plan)} - {"name"}
    if not isinstance(table, dict) or table.keys() - keys:
        raise PlansError(f"[{name}] may hold {', '.join(sorted(keys))}")
    for key, value in table.items():
        kinds = (int, float) if key == "weight" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise PlansError(f"[{name}]: {key} = {value!r} is not a number over zero")
