"""A process that loads weights for this one, and hands them over packed, in memory that both see.

`from_pretrained` changes torch for its whole process while it works (the default dtype, how modules take parameters)
and keeps the interpreter busy; a job that runs meanwhile must notice neither.
"""

import ctypes
import io
import mmap
import os
import pickle
import signal
import subprocess
import sys
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipelines.base import Component, Weights, family_module
from pipelines.residency.packed import ALIGNMENT_BYTES, PackedModule

PR_SET_PDEATHSIG = 1
NICE = 5
"""It takes the processor's time that the running job leaves."""


class LoaderProcessError(Exception):
    """The other process could not load it, or has gone. The message says why."""


class LoaderProcess:
    """The other process, started when it is first needed. For one thread; `kill` may be called from any."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def load(self, weights: Weights, component: Component, device: torch.device) -> PackedModule:
        """What the family's loader makes of the component, packed. Raises NotLoaded."""
        try:
            connection = self._connection or self._start()
            connection.send((weights, component, device.type))
            answer = connection.recv()
            if isinstance(answer, str):
                raise LoaderProcessError(answer)
            return received(answer, reduction.recv_handle(connection))
        except (EOFError, OSError) as error:
            self.kill()
            raise LoaderProcessError("the process that loads weights has ended") from error

    def kill(self) -> None:
        """End it at once; what it was loading is given up."""
        process, self._process, self._connection = self._process, None, None
        if process:
            process.kill()
            process.wait()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.residency.loader_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()  # else a killed process would never show as end of file
        self._connection = ours
        return ours


def serve(connection: Connection) -> None:
    while True:
        weights, component, device_type = connection.recv()
        try:
            loader = family_module(weights.family).loader(weights, torch.device(device_type))
            memory = SharedMemory()
            packed = PackedModule.of(loader.load(component), memory.buffer)
            answer = pickled(packed)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            continue
        connection.send(answer)
        reduction.send_handle(connection, memory.descriptor, os.getppid())
        os.close(memory.descriptor)
        del packed


class SharedMemory:
    """A buffer in a file of no folder: unlike /dev/shm, it is as large as memory."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("weights")

    def buffer(self, size_bytes: int) -> torch.Tensor:
        size_bytes = max(size_bytes, ALIGNMENT_BYTES)
        os.ftruncate(self.descriptor, size_bytes)
        return mapped(self.descriptor, size_bytes)


def mapped(descriptor: int, size_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size_bytes), dtype=torch.uint8)


class Pickler(pickle.Pickler):
    """Tensors that point into the buffer go as their place in it: the bytes themselves stay where they are."""

    def __init__(self, file: io.BytesIO, host: torch.Tensor) -> None:
        super().__init__(file, protocol=5)
        self._start, self._end = host.data_ptr(), host.data_ptr() + host.nbytes

    def persistent_id(self, thing: Any) -> tuple[int, torch.dtype, torch.Size] | None:
        if type(thing) is torch.Tensor and self._start <= thing.data_ptr() < self._end:
            return thing.data_ptr() - self._start, thing.dtype, thing.shape
        return None


class Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, host: torch.Tensor) -> None:
        super().__init__(file)
        self._host = host

    def persistent_load(self, place: Any) -> torch.Tensor:
        offset, dtype, shape = place
        return self._host[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def pickled(packed: PackedModule) -> bytes:
    file = io.BytesIO()
    Pickler(file, packed.host).dump((packed.loaded, packed.layout))
    return file.getvalue()


def received(answer: bytes, descriptor: int) -> PackedModule:
    """The module as the other process packed it."""
    host = mapped(descriptor, os.fstat(descriptor).st_size)
    os.close(descriptor)
    loaded, layout = Unpickler(io.BytesIO(answer), host).load()
    return PackedModule(loaded, layout, host)


def main(descriptor: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        serve(Connection(int(descriptor)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
