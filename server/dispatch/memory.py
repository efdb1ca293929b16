"""What the dispatcher remembers of memory: peaks, out-of-memory attempts, evictions, and what each worker reported."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.base import ComponentStatus, ExecutionMode
from server.scheduling.estimates import PeakEstimates, PeakMeasurement
from server.scheduling.need import Need, Shape
from server.scheduling.placement import Attempt, mode_for_worker, next_attempt, restricted_to
from server.scheduling.types import DeviceState

MAX_EVICTIONS_KEPT = 20


@dataclass(frozen=True)
class EvictedComponent:
    """A component that made room for another job's."""

    key: str
    name: str
    size_bytes: int
    at: float


@dataclass(frozen=True)
class JobAttempts:
    """A job's need at its submit, and its attempts that ran out of memory."""

    need: Need
    failed: tuple[Attempt, ...] = ()


class MemoryTracker:
    """Owned by the dispatcher; in memory only. `held` is what each worker last reported of its components."""

    def __init__(self, peaks: PeakEstimates) -> None:
        self.peaks = peaks
        self.held: dict[str, tuple[ComponentStatus, ...]] = {}
        self.evictions: defaultdict[str, deque[EvictedComponent]] = defaultdict(
            lambda: deque(maxlen=MAX_EVICTIONS_KEPT)
        )
        self._modes: dict[str, ExecutionMode] = {}
        self._attempts: dict[str, JobAttempts] = {}
        self._published: dict[str, object] = {}

    def mode_for_worker(self, job_id: str, need: Need, device: DeviceState) -> ExecutionMode:
        """The mode in which the job runs there, with the phases and streamed blocks that its worker must know."""
        self._modes[job_id] = mode_for_worker(need, device)
        return self._modes[job_id]

    def mode_of(self, job_id: str) -> ExecutionMode | None:
        return self._modes.get(job_id)

    def mode_without_layout(self, job_id: str) -> ExecutionMode:
        """Tier and tiling only: what peaks and attempts are recorded under."""
        mode = self._modes.get(job_id, ExecutionMode())
        return ExecutionMode(mode.tier, mode.tiled)

    def forget(self, job_id: str) -> None:
        self._modes.pop(job_id, None)
        self._attempts.pop(job_id, None)

    def set_held(self, device: str, held: Sequence[ComponentStatus]) -> None:
        self.held[device] = tuple(held)

    def record_eviction(self, device: DeviceState, key: str, now: float) -> None:
        names = {held.key: held.name for held in self.held.get(device.id, ())}
        entry = EvictedComponent(key, names.get(key, "?"), dict(device.resident).get(key, 0), now)
        self.evictions[device.id].appendleft(entry)

    def record_oom(
        self, job_id: str, need: Need, at: DeviceState, devices: Sequence[DeviceState]
    ) -> tuple[Attempt, Attempt | None, Need | None]:
        """The attempt that ran out of memory, the next one and its need; None for both if none is left here."""
        earlier = self._attempts.get(job_id) or JobAttempts(need)
        failed = Attempt(at.id, self.mode_without_layout(job_id))
        attempts = JobAttempts(earlier.need, (*earlier.failed, failed))
        following = next_attempt(attempts.failed, attempts.need, devices)
        self._attempts[job_id] = attempts
        return failed, following, restricted_to(attempts.need, following) if following else None

    def avoid_modes(self, job_id: str, model: str, shape: Shape, at: DeviceState) -> None:
        """A job succeeded in another mode than it began in: jobs like it avoid the modes that failed here."""
        attempts = self._attempts.get(job_id)
        failed = {attempt.way for attempt in attempts.failed if attempt.device == at.id} if attempts else set()
        for mode in failed - {self.mode_without_layout(job_id)}:
            if attempts:
                self.avoid_mode(model, attempts.need, mode, shape, at.budget_bytes)

    def avoid_mode(self, model: str, need: Need, mode: ExecutionMode, shape: Shape, budget_bytes: int) -> None:
        """Record a peak with which the mode just does not fit into this budget."""
        if need.phases:
            self.peaks.add(self._unfitting_peak(model, need, mode, shape, budget_bytes))

    def _unfitting_peak(
        self, model: str, need: Need, mode: ExecutionMode, shape: Shape, budget_bytes: int
    ) -> PeakMeasurement:
        phase = max(need.phases, key=lambda each: need.phase_weights(each, mode) + each.bytes_in(mode))
        weights_bytes = need.weights_bytes if mode.tier == "resident" else need.phase_weights(phase, mode)
        working_bytes = max(phase.bytes_in(mode), budget_bytes - weights_bytes + 1)
        kind = self.peaks.device_kind
        return PeakMeasurement(
            model, mode, phase.name, shape.pixels, shape.frames, kind, working_bytes, working_bytes, 0.0
        )

    def attempts_of(self, job_id: str) -> list[str]:
        """The modes and devices in which the job ran out of memory, for a person."""
        failed = self._attempts[job_id].failed if job_id in self._attempts else ()
        return list(dict.fromkeys(f"{attempt.way.name} on {attempt.device}" for attempt in failed))

    def has_changed(self, device: str, state: Mapping[str, Any]) -> bool:
        """Whether a device differs from when this was last asked, its job aside."""
        shown = {name: value for name, value in state.items() if name not in ("status", "runs")}
        changed = self._published.get(device) != shown
        self._published[device] = shown
        return changed
