"""A component on its way to where a later run will need it, while no run asks for it yet."""

from collections.abc import Callable


class CalledOff(Exception):
    """It is not wanted any more."""


class Coming:
    """`loads`: its files are being read, which `stop` ends at once, where that can be. `off`: it was called off.

    `device_bytes` are those that it has taken on the device so far, while it is not resident.
    """

    def __init__(self, weights_bytes: int, to_device: bool, stop: Callable[[], None] = lambda: None) -> None:
        self.weights_bytes, self.to_device = weights_bytes, to_device
        self.device_bytes = 0
        self.loads = self.off = False
        self._stop = stop

    def call_off(self) -> None:
        self.off = True
        if self.loads:
            self._stop()

    def take(self, device_bytes: int) -> None:
        self.device_bytes = device_bytes
