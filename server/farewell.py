"""How the server ends: at the first signal it lets the running jobs finish, at the second it ends at once."""

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from server.dispatcher import Dispatcher

log = logging.getLogger("plantain.farewell")


class PatientServer(uvicorn.Server):
    """Answers calls while the running jobs finish. Queued jobs go on at the next start, at no cost of an attempt."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, patience_s: float) -> None:
        super().__init__(config)
        self.dispatcher, self.patience_s = dispatcher, patience_s
        self._leaving: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter between two steps of the event loop."""
        self._signals += 1
        name = signal.Signals(sig).name
        if not self.started or self._signals > 1:
            log.warning("%s: ending at once; what runs goes on at the next start", name)
            self.config.timeout_graceful_shutdown = 0
            self.should_exit = True
        else:
            log.warning(
                "%s: the running jobs finish first, at most %.0f s; again to end at once", name, self.patience_s
            )
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._leaving = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self.dispatcher.leave(self.patience_s)
        self.should_exit = True
