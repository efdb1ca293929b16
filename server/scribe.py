"""Writing down what happened, until it is written down."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from server.store import Store

log = logging.getLogger("plantain.scribe")

P = ParamSpec("P")
T = TypeVar("T")

STORE_RETRY_S = 1.0


class Scribe:
    """`trouble` is why nothing can be written, for a person."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.trouble: str | None = None

    async def write(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Until it is written down: a full disk or a locked database holds the queue up, and loses nothing."""
        while True:
            try:
                result = await self.store.call(method, *args, **kwargs)
            except sqlite3.OperationalError as error:
                self.trouble = f"the database cannot be written: {error}"
                log.error("%s", self.trouble)
                await asyncio.sleep(STORE_RETRY_S)
            else:
                self.trouble = None
                return result
