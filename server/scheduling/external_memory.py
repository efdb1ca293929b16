"""What other programs take of a GPU, as its driver tells. Pure."""

from dataclasses import dataclass, replace

STEP_BYTES = 256 * 2**20
"""It counts in whole steps, so that a plan sees few changes; less than one is within the reserve."""

MORE_AFTER_S, LESS_AFTER_S = 2.0, 15.0
"""How long a change must last to count: the driver's figure lags behind what was freed, and programs come and go."""


@dataclass(frozen=True)
class ExternalMemory:
    """`taken_bytes` is what counts now. A change waits: `seen_bytes` is the least of it, `since` when it began."""

    taken_bytes: int = 0
    seen_bytes: int = 0
    since: float | None = None

    def seen(self, bytes_: int, now: float) -> "ExternalMemory":
        """After the driver's next figure. Going down takes a step more than going up: at an edge nothing flutters."""
        seen_bytes = -(-bytes_ // STEP_BYTES) * STEP_BYTES if bytes_ >= STEP_BYTES else 0
        more = seen_bytes > self.taken_bytes
        less = seen_bytes < self.taken_bytes - STEP_BYTES or seen_bytes == 0 < self.taken_bytes
        if not more and not less:
            return ExternalMemory(self.taken_bytes)
        if self.since is None or (self.seen_bytes > self.taken_bytes) is not more:
            return replace(self, seen_bytes=seen_bytes, since=now)
        lasting = min(seen_bytes, self.seen_bytes) if more else max(seen_bytes, self.seen_bytes)
        if now - self.since < (MORE_AFTER_S if more else LESS_AFTER_S):
            return replace(self, seen_bytes=lasting)
        return ExternalMemory(lasting)


def external_bytes(budget_bytes: int, resident_bytes: int, free_bytes: int, margin_bytes: int) -> int:
    """How far what this server has of the device, and could still get, falls short of its budget."""
    return max(0, budget_bytes - (resident_bytes + free_bytes - margin_bytes))
