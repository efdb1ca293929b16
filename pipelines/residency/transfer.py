"""Copies from host memory to the device: asynchronous, in order, on a CUDA stream of their own, with events."""

import time
from collections.abc import Callable

import torch

MEASURED_BYTES = 256 * 2**20


class DeviceTransfer:
    """Copies to one device. Without CUDA, `copy` returns once it is complete, and the other methods do nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> "torch.cuda.Event | None":
        """Starts a copy. Returns its event, for `wait`."""
        if self._stream is None:
            to.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, arrived: "torch.cuda.Event | None") -> None:
        """Makes later computation wait for that copy."""
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def wait_for_compute(self) -> None:
        """Makes later copies wait for earlier computation, which may still read the memory that they overwrite."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Makes later computation wait for all copies. The memory that they write to may be freed after this call."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


class BackgroundTransfer(DeviceTransfer):
    """Copies for a prefetch beside a run: each one completes before `copy` returns, and the run waits for none.

    `check` is called before each copy: it blocks while the run moves weights itself, and raises to cancel.
    """

    def __init__(self, device: torch.device, check: Callable[[], None]) -> None:
        super().__init__(device)
        self._check = check

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self._check()
        if arrived := super().copy(to, source):
            arrived.synchronize()


def measured_bytes_per_s(device: torch.device) -> float | None:
    """The transfer rate from page-locked memory to the device, best of three; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(MEASURED_BYTES, dtype=torch.uint8, pin_memory=True)
    to = torch.empty_like(source, device=device)
    times = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    del source, to
    torch.cuda.empty_cache()
    return MEASURED_BYTES / min(times)
