"""A worker that imports nothing heavy and so starts at once: the real protocol, and files written as the real one does.

A job's prompt says that it fails, or how long it takes: `fail`, `slow SECONDS`.
"""

import contextlib
import ctypes
import random
import signal
import sys
import time
from multiprocessing.connection import Connection

from PIL import Image

from pipelines.media.images import save_image
from server.workers.protocol import Cancel, Cancelled, Failed, Progress, Ready, Resident, Run, Succeeded

PR_SET_PDEATHSIG = 1


def serve(connection: Connection) -> None:
    connection.send(Ready())
    while True:
        match connection.recv():
            case Run() as command:
                connection.send(outcome(connection, command))
                connection.send(Resident(()))
            case Cancel():
                pass
            case _:
                return


def outcome(connection: Connection, command: Run) -> Succeeded | Failed | Cancelled:
    prompt, _, seconds = command.params["prompt"].partition(" ")
    for step in range(3):
        connection.send(Progress(command.job_id, "denoise", step, 3))
        time.sleep(float(seconds) / 3 if seconds else random.uniform(0, 0.01))
        while connection.poll():
            match connection.recv():
                case Cancel(job_id) if job_id == command.job_id:
                    return Cancelled(command.job_id)
                case Cancel():
                    pass
                case _:
                    sys.exit(0)
    if prompt == "fail":
        return Failed(command.job_id, "GENERATION_FAILED", "It was to fail.")
    save_image(Image.new("RGB", (8, 8), "red"), command.output)
    return Succeeded(command.job_id, 8, 8, 0.01)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(Connection(int(sys.argv[1])))
