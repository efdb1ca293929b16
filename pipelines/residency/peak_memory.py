"""How many bytes each phase of a run took beside the weights, at its peak."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from pipelines.base import Peak

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to `clear_refs`, it sets the peak of the resident set back to what it is now (man 5 proc_pid_clear_refs)."""


class Gauge(Protocol):
    def reset(self, give_back: bool = True) -> None:
        """The peak is what is taken now; what is free but kept for later goes back to the system first, or stays."""
        ...

    def peaks(self) -> tuple[int, int]:
        """(taken, in use) at most since the last reset; with the weights, and on a CPU with the whole process."""
        ...


class CudaGauge:
    """What the allocator took from the device: that decides whether another program's memory is left alone."""

    def reset(self, give_back: bool = True) -> None:
        if give_back:
            torch.cuda.empty_cache()  # else a phase answers for what the one before it had
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> tuple[int, int]:
        return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()


class ProcessGauge:
    """The process's resident set, as Linux counts it; files that are mapped count while they are read."""

    def reset(self, give_back: bool = True) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim and give_back:
            trim(0)  # else memory that was freed and kept for the next run would be nobody's
        CLEAR_REFS.write_text(RESET_PEAK)

    def peaks(self) -> tuple[int, int]:
        peak_bytes = kibibytes("VmHWM") * 1024
        return peak_bytes, peak_bytes


def kibibytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def gauge_for(device: torch.device) -> Gauge | None:
    """None where nothing can be measured."""
    if device.type == "cuda":
        return CudaGauge()
    return ProcessGauge() if CLEAR_REFS.exists() else None


class PeakMeter:
    """For one run at a time. What a phase had before and after weights were loaded counts, the loading itself does not.

    `weights_bytes` tells what the weights take now: on a CPU in the process, else on the device. While `blind`, nothing
    is written down: something that is not the run's takes memory of the process.
    """

    def __init__(self, gauge: Gauge | None, weights_bytes: Callable[[], int]) -> None:
        self._gauge, self._weights_bytes = gauge, weights_bytes
        self._found: dict[str, Peak] = {}
        self._phase: str | None = None
        self._base_bytes = 0
        self.paused = False

    def begin(self) -> None:
        """A run starts: what the process has now, less the weights, is nobody's working memory."""
        self._found, self._phase = {}, None
        if self._gauge:
            self._gauge.reset()
            self._base_bytes = max(0, self._gauge.peaks()[0] - self._weights_bytes())

    def enter(self, phase: str) -> None:
        self.record()
        self._phase = phase
        self.restart()

    def record(self) -> None:
        """Write down the peak since the last restart."""
        if self._gauge is None or self._phase is None or self.paused:
            return
        weights_bytes = self._weights_bytes()
        beside = [max(0, peak - self._base_bytes - weights_bytes) for peak in self._gauge.peaks()]
        last = self._found.get(self._phase)
        if last is None or beside[0] > last.working_bytes:
            self._found[self._phase] = Peak(self._phase, beside[0], beside[1], weights_bytes)

    def restart(self, give_back: bool = True) -> None:
        if self._gauge:
            self._gauge.reset(give_back)

    def end(self) -> tuple[Peak, ...]:
        """The peaks of the run, in the order of its phases."""
        self.record()
        self._phase = None
        return tuple(self._found.values())
