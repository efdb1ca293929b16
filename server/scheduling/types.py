"""What the scheduler decides about: devices and waiting jobs; and its decisions, the actions. Pure."""

import sys
from dataclasses import dataclass, replace
from functools import cached_property

from server.scheduling.need import Need

GIB = 2**30
LINK_BYTES_PER_S = 12e9
"""Host to device, before a worker has measured it: PCIe 3 x16, or half of PCIe 4."""


@dataclass(frozen=True)
class DeviceState:
    """A device as the scheduler sees it.

    `budget_bytes`: what may be given out now, without the `external_bytes` that other processes use.
    `resident`: (component key, bytes), least recently used first.
    `host_budget_bytes`: for `host_copies` of weights, where the host is not the device itself.
    `running_expected_s`: how long the running job takes in all; `running_need`: its need, if another job may follow it;
    `free_at`: when it should have ended.
    `prefetching_for`: the waiting job that the device has prefetched for; `prefetched`: components not used yet.
    """

    id: str
    budget_bytes: int
    resident: tuple[tuple[str, int], ...] = ()
    idle: bool = True
    link_bytes_per_s: float = LINK_BYTES_PER_S
    host_budget_bytes: int | None = None
    running_expected_s: float = 0.0
    external_bytes: int = 0
    running_need: Need | None = None
    free_at: float = 0.0
    prefetching_for: str | None = None
    prefetched: frozenset[str] = frozenset()
    host_copies: tuple[tuple[str, int], ...] = ()

    @property
    def without_other_processes(self) -> "DeviceState":
        """As if no other process used the device."""
        return replace(self, budget_bytes=self.budget_bytes + self.external_bytes, external_bytes=0)

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - sum(weights_bytes for _, weights_bytes in self.resident)

    def missing_bytes(self, need: Need) -> int:
        """Weights that would have to be loaded before the job could run. A streamed component is there in part."""
        resident = dict(self.resident)
        return sum(max(0, weights_bytes - resident.get(key, 0)) for key, weights_bytes in need.components)

    def without_prefetched(self) -> "DeviceState":
        """As if nothing had been prefetched; the bytes stay taken."""
        return replace(self, resident=tuple(entry for entry in self.resident if entry[0] not in self.prefetched))


@dataclass(frozen=True)
class Evict:
    device: str
    key: str


@dataclass(frozen=True)
class Prefetch:
    """Components of a waiting job, in the order in which it needs them: for the device, or for host memory only."""

    device: str
    job_id: str
    to_device: tuple[str, ...] = ()
    to_host: tuple[str, ...] = ()


@dataclass(frozen=True)
class WaitingJob:
    """A queued job. A plan reads a sequence of them, oldest first. `priority` is 0 unless an admin said otherwise.

    Jobs of one `group` are alike to their user, who expects them in order, whatever was learned between their submits.
    """

    job_id: str
    need: Need
    user_id: str = ""
    weight: float = 1.0
    priority: int = 0
    expected_s: float = 1.0
    created_at: float = 0.0
    group: str = ""

    @cached_property
    def kind(self) -> str:
        """Jobs of one kind are alike to a device. A string, since it remembers its hash; and one for all that are."""
        return sys.intern(f"{hash(self.need)} {self.expected_s:.2g}")

    @cached_property
    def line(self) -> str:
        """Jobs of one line are taken one after the other: one user's, of one group (else kind) and priority."""
        return sys.intern(f"{self.priority} {self.user_id} {self.group or self.kind}")


@dataclass(frozen=True)
class Start:
    job_id: str
    device: str


@dataclass(frozen=True)
class Refuse:
    """No device could hold the job, even with nothing else on it."""

    job_id: str
    need_bytes: int
    budget_bytes: int


Action = Evict | Start | Refuse | Prefetch
