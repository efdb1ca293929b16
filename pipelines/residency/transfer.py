"""The way from the host's memory to the device's: copies in order on a stream of their own, waited for by events."""

import time
from collections.abc import Callable

import torch

MEASURED_BYTES = 256 * 2**20


class DeviceTransfer:
    """Copies to one device. Without CUDA a copy is done when `copy` returns, and there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> "torch.cuda.Event | None":
        """Start a copy; what comes back is for `wait`."""
        if self._stream is None:
            to.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, arrived: "torch.cuda.Event | None") -> None:
        """Whatever is computed from here on waits for that copy."""
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def wait_for_compute(self) -> None:
        """Copies from here on wait for what is computed up to here: it may still read the memory they write to."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Whatever is computed from here on waits for all copies; memory that they write to may then be freed."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


class BackgroundTransfer(DeviceTransfer):
    """Copies beside a run that must not wait for them: one at a time, on a stream of its own, to its end.

    `check` is asked before each one: it waits while the run moves weights itself, and raises to stop.
    """

    def __init__(self, device: torch.device, check: Callable[[], None]) -> None:
        super().__init__(device)
        self._check = check

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self._check()
        if arrived := super().copy(to, source):
            arrived.synchronize()


def measured_bytes_per_s(device: torch.device) -> float | None:
    """The link's rate from page-locked memory, best of three; None where the host is the device."""
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
