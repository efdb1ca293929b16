"""Loader subprocess: loads weights beside a running job, and transfers them packed, through shared memory.

`from_pretrained` changes torch for its whole process while it works (the default dtype, how modules take parameters)
and holds the interpreter lock; neither may affect the job that runs meanwhile.
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
from pipelines.python_process import import_environment, module_command
from pipelines.residency.packed import ALIGNMENT_BYTES, PackedModule

PR_SET_PDEATHSIG = 1
NICE = 5
"""Added to the subprocess's niceness: the running job has priority on the CPU."""


class LoaderProcessError(Exception):
    """The subprocess could not load a component, or exited. The message is the reason."""


class LoaderProcess:
    """The parent's handle on the subprocess, which starts with the first `load`. For one thread, except `kill`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def load(self, weights: Weights, component: Component, device: torch.device) -> PackedModule:
        """Returns what the family's loader makes of the component, packed. Raises LoaderProcessError."""
        try:
            connection = self._connection or self._start()
            connection.send((weights, component, device.type))
            reply = connection.recv()
            if isinstance(reply, str):
                raise LoaderProcessError(reply)
            return received(reply, reduction.recv_handle(connection))
        except (EOFError, OSError) as error:
            self.kill()
            raise LoaderProcessError("the loader process has exited") from error

    def kill(self) -> None:
        """Kills the subprocess, and with it the load that is under way. The next `load` starts another one."""
        process, self._process, self._connection = self._process, None, None
        if process:
            process.kill()
            process.wait()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            module_command("pipelines.residency.loader_process", str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            env={**import_environment(), "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()  # else the end of a killed process is never seen as EOF
        self._connection = ours
        return ours


def serve(connection: Connection) -> None:
    """The subprocess: loads what is requested, and replies with the pickled module and a descriptor, or an error."""
    while True:
        weights, component, device_type = connection.recv()
        try:
            loader = family_module(weights.family).loader(weights, torch.device(device_type))
            memory = SharedMemory()
            packed = PackedModule.of(loader.load(component), memory.buffer)
            reply = pickled(packed)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            continue
        connection.send(reply)
        reduction.send_handle(connection, memory.descriptor, os.getppid())
        os.close(memory.descriptor)
        del packed


class SharedMemory:
    """A buffer in an anonymous file (memfd), which unlike /dev/shm may be as large as the host's memory."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("weights")

    def buffer(self, size_bytes: int) -> torch.Tensor:
        size_bytes = max(size_bytes, ALIGNMENT_BYTES)
        os.ftruncate(self.descriptor, size_bytes)
        return mapped(self.descriptor, size_bytes)


def mapped(descriptor: int, size_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size_bytes), dtype=torch.uint8)


class Pickler(pickle.Pickler):
    """Pickles tensors that point into the buffer as (offset, dtype, shape), without their bytes."""

    def __init__(self, file: io.BytesIO, host: torch.Tensor) -> None:
        super().__init__(file, protocol=5)
        self._start, self._end = host.data_ptr(), host.data_ptr() + host.nbytes

    def persistent_id(self, thing: Any) -> tuple[int, torch.dtype, torch.Size] | None:
        if type(thing) is torch.Tensor and self._start <= thing.data_ptr() < self._end:
            return thing.data_ptr() - self._start, thing.dtype, thing.shape
        return None


class Unpickler(pickle.Unpickler):
    """Restores such tensors as views into this process's mapping of the buffer."""

    def __init__(self, file: io.BytesIO, host: torch.Tensor) -> None:
        super().__init__(file)
        self._host = host

    def persistent_load(self, slot: Any) -> torch.Tensor:
        offset, dtype, shape = slot
        return self._host[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def pickled(packed: PackedModule) -> bytes:
    file = io.BytesIO()
    Pickler(file, packed.host).dump((packed.loaded, packed.layout))
    return file.getvalue()


def received(reply: bytes, descriptor: int) -> PackedModule:
    """The module as the subprocess packed it. Closes the descriptor."""
    host = mapped(descriptor, os.fstat(descriptor).st_size)
    os.close(descriptor)
    loaded, layout = Unpickler(io.BytesIO(reply), host).load()
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
