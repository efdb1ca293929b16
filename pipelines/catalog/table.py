"""Reads a TOML table strictly: the types it asks for, no key it does not know, errors that name the table."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

T = TypeVar("T")
REQUIRED: Any = object()

NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


class CatalogError(ValueError):
    """`weights.toml` says something that cannot be meant. The message names the table and the key."""


class Table:
    """Keys are taken one by one; `done()` refuses what is left, so that a misspelt key is never silent."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise CatalogError(f"{where} must be a table")
        self.where = where
        self.left = dict(values)
        self.known: list[str] = []

    def take(self, key: str, kind: type[T], default: Any = REQUIRED) -> T:
        self.known.append(key)
        if key in self.left:
            return checked(self.left.pop(key), kind, f"{self.where}: {key}")
        if default is REQUIRED:
            raise CatalogError(f"{self.where}: {key} is missing")
        return default

    def among(self, key: str, value: str, literal: Any) -> str:
        """`value`, if it is one of a `Literal`'s."""
        if value not in get_args(literal):
            raise CatalogError(f"{self.where}: {key} {value!r} is none of {', '.join(get_args(literal))}")
        return value

    def words(self, key: str) -> tuple[str, ...]:
        return tuple(checked(word, str, f"{self.where}: {key}") for word in self.take(key, list, []))

    def mapping(self, key: str, kind: type[T]) -> Mapping[str, T]:
        values = self.take(key, dict, {})
        return {name: checked(value, kind, f"{self.where}: {key}.{name}") for name, value in values.items()}

    def table(self, key: str) -> "Table":
        return Table(f"{self.where}: {key}", self.take(key, dict, {}))

    def tables(self, key: str) -> dict[str, "Table"]:
        return {name: Table(f"[{key}.{name}]", value) for name, value in self.take(key, dict, {}).items()}

    def done(self) -> None:
        """Refuses what nobody took."""
        self.allow(self.known)

    def allow(self, known: Iterable[str]) -> None:
        """Refuses keys other than these."""
        known = list(known)
        for key in self.left:
            if key not in known:
                close = get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise CatalogError(f"{self.where}: {key} is not known; {hint}")


def checked(value: Any, kind: type[T], where: str) -> T:
    """`value`, if it is a `kind`: exactly, so that `true` is no number, but a whole number is one."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise CatalogError(f"{where} must be {NAMES[kind]}, not {value!r}")
    return value
