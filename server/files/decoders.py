"""Processes apart in which callers' images are decoded: a decoder may hang, crash or hoard memory; the server may not.

Nor could a thread do it: for WebP and AVIF, Pillow holds the interpreter for seconds.
"""

import json
import logging
import subprocess
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
from anyio.to_thread import run_sync

from pipelines.base import InvalidInput
from pipelines.media.images import ImageInfo
from pipelines.python_process import import_environment, module_command

log = logging.getLogger("plantain.decoders")

COMMAND = tuple(module_command("pipelines.media.decoder"))


class DecoderProcess:
    """One process, started when it is first asked, and gone when this object is."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None

    def ask(self, path: Path) -> dict[str, Any] | None:
        """Blocks. None if the process died."""
        self._process = process = self._process or self._started()
        assert process.stdin and process.stdout
        try:
            print(json.dumps(str(path)), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        if self._process:
            _stop(self._process)

    def _started(self) -> subprocess.Popen[str]:
        """In a session of its own: Ctrl-C is the server's to handle, and a server that goes takes its input away."""
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=import_environment(),
            start_new_session=True,
        )
        weakref.finalize(self, _stop, process)
        return process


class ImageDecoders:
    """At most `at_once` of them: a picture of 64 megapixels takes from 256 MiB to a gigabyte while it is decoded."""

    def __init__(self, at_once: int = 2, timeout_s: float = 20.0, command: Sequence[str] = COMMAND) -> None:
        self.timeout_s, self.command = timeout_s, command
        self._slots = anyio.CapacityLimiter(at_once)
        self._idle: list[DecoderProcess] = []

    async def check(self, path: Path) -> ImageInfo:
        """Decode all of it. Raises `InvalidInput` if that cannot be done, or not in `timeout_s`."""
        async with self._slots:
            decoder = self._idle.pop() if self._idle else DecoderProcess(self.command)
            try:
                answer = await self._ask(decoder, path)
            except BaseException:
                decoder.stop()
                raise
            self._idle.append(decoder)
        if "refused" in answer:
            raise InvalidInput(answer["refused"])
        return ImageInfo(**answer["image"])

    async def _ask(self, decoder: DecoderProcess, path: Path) -> dict[str, Any]:
        try:
            with anyio.fail_after(self.timeout_s):
                answer = await run_sync(decoder.ask, path, abandon_on_cancel=True)
        except TimeoutError as error:
            raise InvalidInput("The image takes too long to decode.") from error
        if answer is None:
            log.warning("a decoder died of an image")
            raise InvalidInput("The image cannot be decoded.")
        return answer


def _stop(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(BrokenPipeError):  # closing writes what is left in the buffer
                pipe.close()
