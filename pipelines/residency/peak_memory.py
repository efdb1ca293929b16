"""Peak memory of each phase of a run, in bytes, without the weights."""

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
        """Sets the peak to the current use. With `give_back`, unused cached memory is returned to the system before."""
        ...

    def peaks(self) -> tuple[int, int]:
        """(reserved, in use): the highest bytes since the last reset, with weights; on a CPU, of the whole process."""
        ...


class CudaGauge:
    """Bytes that torch's allocator reserved on the device: that is what other programs cannot use."""

    def reset(self, give_back: bool = True) -> None:
        if give_back:
            torch.cuda.empty_cache()  # else memory cached by the previous phase counts for this one
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> tuple[int, int]:
        return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()


class ProcessGauge:
    """The resident set of this process, as Linux counts it. Pages of mapped files count while they are read."""

    def reset(self, give_back: bool = True) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim and give_back:
            trim(0)  # else freed memory that malloc keeps would count as the run's
        CLEAR_REFS.write_text(RESET_PEAK)

    def peaks(self) -> tuple[int, int]:
        peak_bytes = kibibytes("VmHWM") * 1024
        return peak_bytes, peak_bytes


def kibibytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def gauge_for(device: torch.device) -> Gauge | None:
    """None if peaks cannot be measured here (neither CUDA nor Linux)."""
    if device.type == "cuda":
        return CudaGauge()
    return ProcessGauge() if CLEAR_REFS.exists() else None


class PeakMeter:
    """Records the peaks of one run at a time, by phase, with `weights_bytes` subtracted.

    What a phase used before and after weights were loaded counts; the loading itself does not: callers `record` before
    they move weights and `restart` afterwards. `weights_bytes` returns the bytes of weights in the measured memory.
    """

    def __init__(self, gauge: Gauge | None, weights_bytes: Callable[[], int]) -> None:
        self._gauge, self._weights_bytes = gauge, weights_bytes
        self._peaks: dict[str, Peak] = {}
        self._phase: str | None = None
        self._base_bytes = 0
        self._paused = False

    def begin(self) -> None:
        """Starts a run. What the process uses now besides weights is the base, and does not count."""
        self._peaks, self._phase = {}, None
        if self._gauge:
            self._gauge.reset()
            self._base_bytes = max(0, self._gauge.peaks()[0] - self._weights_bytes())

    def enter(self, phase: str) -> None:
        self.record()
        self._phase = phase
        self.restart()

    def record(self) -> None:
        """Records the peak since the last restart, if it is the highest of its phase."""
        if self._gauge is None or self._phase is None or self._paused:
            return
        weights_bytes = self._weights_bytes()
        working, allocated = (max(0, peak - self._base_bytes - weights_bytes) for peak in self._gauge.peaks())
        last = self._peaks.get(self._phase)
        if last is None or working > last.working_bytes:
            self._peaks[self._phase] = Peak(self._phase, working, allocated, weights_bytes)

    def restart(self, give_back: bool = True) -> None:
        if self._gauge:
            self._gauge.reset(give_back)

    def pause(self) -> None:
        """Records nothing until `resume`."""
        self.record()
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self.restart(give_back=False)

    def end(self) -> tuple[Peak, ...]:
        """Ends the run. Returns its peaks, in the order of its phases."""
        self.record()
        self._phase = None
        return tuple(self._peaks.values())
