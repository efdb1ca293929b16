"""The worker process, which owns one device: receives commands from a pipe, runs jobs one by one, sends events.

Started by the supervisor as `python -m server.workers.process FD DEVICE FAMILY…`. It exits when the server does.
"""

import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from pipelines.base import InvalidInput, JobCancelled, OnStep, Pipeline, UnusableWeights, Weights, family_module
from pipelines.device_errors import is_device_lost, is_out_of_memory
from pipelines.media.images import save_image
from pipelines.media.video_writer import VideoOutput
from pipelines.params import PARAMS
from pipelines.residency.host_cache import HostMemoryExhausted
from pipelines.residency.prefetch import Prefetcher, PrefetchRequest
from pipelines.residency.residency import Residency
from pipelines.residency.transfer import measured_bytes_per_s
from server.workers.protocol import (
    Cancel,
    Cancelled,
    Command,
    Event,
    Evict,
    Failed,
    Prefetch,
    Prefetched,
    Progress,
    Ready,
    Resident,
    Run,
    Succeeded,
)

log = logging.getLogger("plantain.worker")
PR_SET_PDEATHSIG = 1

HOST_BUDGET = "PLANTAIN_WORKER_HOST_BYTES"
"""Environment variable: the budget in bytes of this worker's copies of weights in host memory."""


class WorkerProcess:
    """One device, the weights that are resident on it, and the pipelines that run them.

    Two threads: one runs jobs, the other prefetches components for the next job. Both send events.
    """

    def __init__(self, connection: Connection, device: str, families: list[str]) -> None:
        self.connection = connection
        self.residency = Residency(device, host_budget_bytes=int(os.environ.get(HOST_BUDGET, 0)) or None)
        self.pipelines: dict[Weights, Pipeline] = {}
        self.families = families
        self.prefetcher = Prefetcher(self.residency, self.send_prefetch_event)
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Handles commands until the server closes the pipe or requests a shutdown."""
        self.send(Ready(measured_bytes_per_s(self.residency.device)))
        while True:
            self.preload_families()
            match self.connection.recv():
                case Run() as command:
                    self.run(command)
                    self.residency.release_cache()
                    self.send_resident()
                case Evict() | Prefetch() as command:
                    self.handle_residency_command(command)
                case Cancel():
                    pass  # the job ended before the command arrived
                case _:
                    return

    def preload_families(self) -> None:
        """Imports family modules while no command is waiting: some take seconds."""
        while self.families and not self.connection.poll():
            family_module(self.families.pop())

    def run(self, command: Run) -> None:
        """Runs one job and sends its event. Raises CUDA errors other than out of memory: the process must exit then."""
        try:
            self.send(self.run_pipeline(command))
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
            if is_device_lost(error):
                raise

    def failure(self, job_id: str, error: Exception) -> Failed:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return Failed(job_id, "STORAGE_FULL", "The server's disk is full.")
        if not is_out_of_memory(error):
            return Failed(job_id, "GENERATION_FAILED", "The generation failed; the server's log says why.")
        traceback.clear_frames(error.__traceback__)  # their local variables refer to the tensors of the run
        self.residency.evict_all()
        if isinstance(error, MemoryError):
            self.residency.clear()
        message = str(error) if isinstance(error, HostMemoryExhausted) else "The device ran out of memory."
        return Failed(job_id, "OUT_OF_MEMORY", message)

    def handle_residency_command(self, command: Evict | Prefetch) -> None:
        """Evicts or prefetches, between two jobs or two steps of one."""
        if isinstance(command, Evict):
            self.residency.evict(command.key)
            self.send_resident()
        else:
            self.prefetcher.submit(PrefetchRequest(command.job_id, command.weights, command.to_device, command.to_host))

    def send_resident(self) -> None:
        with self._sending:  # read and sent under one lock: the last event has the latest state
            self.connection.send(Resident(self.residency.resident(), self.residency.component_statuses()))

    def send_prefetch_event(self, job_id: str, failure: str | None) -> None:
        """Called by the prefetch thread after each component, and with `failure` (or "") at the end of a request."""
        self.send_resident()
        if failure is not None:
            self.send(Prefetched(job_id, failure))

    def run_pipeline(self, command: Run) -> Succeeded:
        started = time.monotonic()
        context = {"files": command.files, "loras": command.loras}
        params = PARAMS[command.workflow].model_validate(dict(command.params), context=context)
        on_step = self.on_step(command.job_id)
        pipeline = self.pipeline(command.weights)
        self.residency.begin_run(command.way, [component.key for component in command.weights.components])
        made = pipeline.generate(params, on_step)
        peaks = self.residency.end_run() if not command.loras else ()  # a LoRA's memory is not the model's
        if isinstance(made, VideoOutput):
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
        def report(phase: str, step: int, steps: int) -> None:
            self.residency.enter_phase(phase)
            self.send(Progress(job_id, phase, step, steps))
            while self.connection.poll():
                if self.handle_while_running(job_id, self.connection.recv()):
                    raise JobCancelled

        return report

    def handle_while_running(self, job_id: str, command: Command) -> bool:
        """Handles a command between two steps. Returns whether it cancels this job. A shutdown exits the process."""
        match command:
            case Cancel():
                return command.job_id == job_id
            case Evict() | Prefetch():
                self.handle_residency_command(command)
                return False
        sys.exit(0)

    def send(self, event: Event) -> None:
        with self._sending:
            self.connection.send(event)


def main(descriptor: str, device: str, *families: str) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(levelname)s [{device}] %(message)s")
    # bitsandbytes warns of a missing package, which would download code from a hub and is not needed here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then stops its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGKILL
        )  # a killed server must not leave workers that occupy devices
    worker = WorkerProcess(Connection(int(descriptor)), device, list(families))
    try:
        worker.serve()
    except (EOFError, BrokenPipeError):
        log.info("the server has exited")
    finally:
        worker.prefetcher.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
