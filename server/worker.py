"""The process that owns one device: takes commands from its pipe, runs them one by one, tells events.

Started by the supervisor as `python -m server.worker FD DEVICE FAMILY…`; it ends when the server does.
"""

import ctypes
import errno
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from pipelines.base import InvalidInput, JobCancelled, OnStep, Pipeline, UnusableWeights, Weights
from pipelines.clips import Clip
from pipelines.faults import broke_the_device, ran_out_of_memory
from pipelines.hostram import HostRamShort
from pipelines.images import save_image
from pipelines.link import measured_bytes_per_s
from pipelines.params import PARAMS
from pipelines.residency import Residency
from server.protocol import Cancel, Cancelled, Command, Event, Evict, Failed, Progress, Ready, Resident, Run, Succeeded

log = logging.getLogger("plantain.worker")

PR_SET_PDEATHSIG = 1

HOST_BUDGET = "PLANTAIN_WORKER_HOST_BYTES"
"""In the environment: what this worker's copies of weights in host memory may take."""


class Worker:
    """One device, the weights that are resident on it, and the pipelines that run them."""

    def __init__(self, connection: Connection, device: str, families: list[str]) -> None:
        self.connection = connection
        self.residency = Residency(device, host_budget_bytes=int(os.environ.get(HOST_BUDGET, 0)) or None)
        self.pipelines: dict[Weights, Pipeline] = {}
        self.families = families

    def serve(self) -> None:
        """Until the server closes the pipe or asks for an end."""
        self.send(Ready(measured_bytes_per_s(self.residency.device)))
        while True:
            self.prepare()
            match self.connection.recv():
                case Run() as command:
                    self.run(command)
                    self.tell_resident()
                case Evict(key):
                    self.residency.evict(key)
                    self.tell_resident()
                case Cancel():
                    pass  # it ended before the command came
                case _:
                    return

    def prepare(self) -> None:
        """Import families while nothing waits: some take seconds, which no request should wait for."""
        while self.families and not self.connection.poll():
            family_module(self.families.pop())

    def run(self, command: Run) -> None:
        """Run one job to its event. After a CUDA error other than out of memory the context is not to be trusted."""
        try:
            self.send(self.outcome(command))
        except JobCancelled:
            self.send(Cancelled(command.job_id))
        except InvalidInput as error:
            self.send(Failed(command.job_id, "INVALID_MEDIA", str(error)))
        except UnusableWeights as error:
            log.exception("job %s", command.job_id)
            self.send(Failed(command.job_id, "WEIGHTS_UNUSABLE", str(error)))
        except Exception as error:
            log.exception("job %s", command.job_id)
            self.send(self.failure(command.job_id, error))
            if broke_the_device(error):
                raise

    def failure(self, job_id: str, error: Exception) -> Failed:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return Failed(job_id, "STORAGE_FULL", "The server's disk is full.")
        if not ran_out_of_memory(error):
            return Failed(job_id, "GENERATION_FAILED", "The generation failed; the server's log says why.")
        traceback.clear_frames(error.__traceback__)  # they keep what the run had made so far
        self.residency.evict_all()
        if isinstance(error, MemoryError):
            self.residency.clear()
        message = str(error) if isinstance(error, HostRamShort) else "The device ran out of memory."
        return Failed(job_id, "OUT_OF_MEMORY", message)

    def tell_resident(self) -> None:
        self.residency.rest()
        self.send(Resident(self.residency.resident(), self.residency.held()))

    def outcome(self, command: Run) -> Succeeded:
        started = time.monotonic()
        context = {"files": command.files, "loras": command.loras}
        params = PARAMS[command.workflow].model_validate(dict(command.params), context=context)
        on_step = self.on_step(command.job_id)
        pipeline = self.pipeline(command.weights)
        self.residency.begin(command.way)
        made = pipeline.generate(params, on_step)
        peaks = self.residency.meter.end() if not command.loras else ()  # theirs are not the model's
        if isinstance(made, Clip):
            saved = made.save(command.output, on_step)
            run_s = time.monotonic() - started
            return Succeeded(command.job_id, saved.width, saved.height, run_s, saved.duration_s, peaks)
        save_image(made, command.output, params.output_format)
        run_s = time.monotonic() - started
        return Succeeded(command.job_id, made.width, made.height, run_s, peaks=peaks)

    def pipeline(self, weights: Weights) -> Pipeline:
        if weights not in self.pipelines:
            self.pipelines[weights] = family_module(weights.family).build(weights, self.residency)
        return self.pipelines[weights]

    def on_step(self, job_id: str) -> OnStep:
        def tell(phase: str, step: int, steps: int) -> None:
            self.residency.enter(phase)
            self.send(Progress(job_id, phase, step, steps))
            while self.connection.poll():
                if self.was_cancelled(job_id, self.connection.recv()):
                    raise JobCancelled

        return tell

    def was_cancelled(self, job_id: str, command: Command) -> bool:
        """While a job runs only cancels are sent, and a shutdown, which ends the process here and now."""
        if isinstance(command, Cancel):
            return command.job_id == job_id
        sys.exit(0)

    def send(self, event: Event) -> None:
        self.connection.send(event)


def family_module(family: str) -> Any:
    """`flux` → `pipelines.flux`; a dotted name is a family of one's own."""
    return importlib.import_module(family if "." in family else f"pipelines.{family}")


def main(descriptor: str, device: str, *families: str) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(levelname)s [{device}] %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed server must not leave a device occupied
    try:
        Worker(Connection(int(descriptor)), device, list(families)).serve()
    except (EOFError, BrokenPipeError):
        log.info("the server is gone")


if __name__ == "__main__":
    main(*sys.argv[1:])
