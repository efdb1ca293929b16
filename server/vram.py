"""What a job needs on a device, in bytes."""

from dataclasses import dataclass
from functools import cached_property

from pipelines.base import Weights
from pipelines.catalog import Working


@dataclass(frozen=True)
class Need:
    """`components` are (key, weights_bytes); `working_bytes` is what the run takes beside them."""

    components: tuple[tuple[str, int], ...]
    working_bytes: int

    @cached_property
    def weights_bytes(self) -> int:
        return sum(weights_bytes for _, weights_bytes in self.components)

    @cached_property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(key for key, _ in self.components)


def need_of(weights: Weights, working: Working, pixels: int) -> Need:
    """The need of one run whose output has `pixels` pixels; components that are one and the same count once."""
    components = {component.key: component.weights_bytes for component in weights.components}
    return Need(tuple(components.items()), working.fixed_bytes + working.bytes_per_pixel * pixels)
