"""The parent's handle on one worker: starts the process, passes commands in and events out, notices its death."""

import asyncio
import logging
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from pipelines.python_process import module_command
from server.workers.devices import DeviceSpec, environment
from server.workers.protocol import Command, Died, Event, Shutdown

log = logging.getLogger("plantain.supervisor")

EXIT_S = 2.0
"""A worker that closed its pipe is given this long to exit."""

OnEvent = Callable[[str, Event], None]
"""Told (device id, event), on the event loop."""


class Supervisor:
    """One worker process, spawned afresh: nothing of the server's memory, threads or imports goes with it."""

    def __init__(
        self, device: DeviceSpec, families: Sequence[str], on_event: OnEvent, module: str = "server.workers.process"
    ) -> None:
        self.device = device
        self._module = module
        self._families = families
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._burial: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Spawn the worker; it says `Ready` when it takes commands."""
        ours, theirs = Pipe()
        arguments = [str(theirs.fileno()), self.device.torch_device, *self._families]
        self._process = subprocess.Popen(
            module_command(self._module, *arguments),
            pass_fds=[theirs.fileno()],
            env=environment(self.device),
        )
        theirs.close()  # else a killed worker would never show as end of file
        self._connection = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read)

    def send(self, command: Command) -> None:
        """Does nothing when the worker is gone: its death is told as an event."""
        try:
            if self._connection:
                self._connection.send(command)
        except (BrokenPipeError, ConnectionResetError):
            log.info("%s: the worker is gone before %s", self.device.id, type(command).__name__)

    def kill(self) -> None:
        if self._process:
            self._process.kill()

    async def stop(self, patience_s: float) -> None:
        """Ask for an end, wait, then kill. No event is told any more."""
        self.send(Shutdown())
        self._forget()
        if self._process:
            await asyncio.to_thread(exit_code, self._process, patience_s)

    def _read(self) -> None:
        try:
            while self._connection and self._connection.poll():
                self._on_event(self.device.id, self._connection.recv())
        except (EOFError, OSError):
            self._forget()
            self._burial = asyncio.ensure_future(self._bury())

    async def _bury(self) -> None:
        """The pipe has ended: so has the process, or it must. Giving much memory back can take a while."""
        if self._process:
            self._on_event(self.device.id, Died(await asyncio.to_thread(exit_code, self._process, EXIT_S)))

    def _forget(self) -> None:
        if self._connection:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None


def exit_code(process: subprocess.Popen[bytes], patience_s: float) -> int:
    """Wait for the end of a process, at most so long before killing it."""
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
