"""Runs the functions of `*_rows` and `credentials`, which take the open database, off the event loop."""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sqlite_utils import Database

from server.services import Services
from server.store import Store

P = ParamSpec("P")
T = TypeVar("T")


async def in_transaction(
    served: Services, function: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """All of what `function` changes, or, if it raises, nothing."""
    return await served.store.call(_transaction, served.store, lambda db: function(db, *args, **kwargs))


def _transaction(store: Store, function: Callable[[Database], T]) -> T:
    with store.atomic() as db:
        return function(db)
