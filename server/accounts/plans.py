"""Plans: requests a minute, concurrent jobs and the share of busy devices, from `plans.toml`."""

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
    """`plans.toml` is invalid."""


@dataclass(frozen=True)
class Plan:
    """None is no limit. `weight` is the share of busy devices, relative to other users with waiting jobs."""

    name: str
    requests_a_minute: int | None = None
    jobs_at_once: int | None = None
    weight: float = 1.0


UNLIMITED = Plan("unlimited")


class Plans(Mapping[str, Plan]):
    """Plans by name, in the order of the files."""

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
        """The defaults, overridden by each of `paths` that exists. Raises PlansError, which begins with the path."""
        tables: dict[str, dict[str, Any]] = {}
        for path in (DEFAULTS, *paths):
            if path.exists():
                tables |= _tables(path)
        return cls(Plan(name, **table) for name, table in tables.items())

    def of(self, name: str) -> Plan:
        """A user's plan. A plan that an operator has removed since counts as the sign-up plan."""
        if name not in self:
            log.warning("plan %r is not in plans.toml; its users get %r", name, SIGN_UP_PLAN)
        return self.get(name, self[SIGN_UP_PLAN])

    def known(self, name: str) -> str:
        """Returns the name. Raises InvalidBody if there is no such plan."""
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
