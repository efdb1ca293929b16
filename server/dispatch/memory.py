"""What the dispatcher knows of memory: peaks, tries that ran out, evictions, and what each worker said it holds."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.base import ComponentStatus, ExecutionMode, Peak
from server.dispatch.records import read_attempts, read_peaks, record_attempt, record_device, record_peaks
from server.dispatch.status import attempt_json, component_json, prefetch_json
from server.dispatch.worker_state import PrefetchState
from server.jobs.job import Job
from server.jobs.store import JobStore
from server.scheduling.estimates import PeakEstimates, PeakMeasurement
from server.scheduling.need import Need, Shape
from server.scheduling.placement import Attempt, mode_for_worker, next_attempt, restricted_to
from server.scheduling.types import DeviceState
from server.timestamps import iso
from server.workers.devices import DeviceSpec

EVICTIONS_SHOWN = 20


@dataclass(frozen=True)
class EvictedComponent:
    """A component that made room for another job's."""

    key: str
    name: str
    size_bytes: int
    at: float


@dataclass(frozen=True)
class JobAttempts:
    """A job's need as at its submit, and the tries that ran out of memory."""

    need: Need
    failed: tuple[Attempt, ...] = ()


class MemoryTracker:
    """Owned by the dispatcher. What writes to the database says so; those are to be called off the event loop."""

    def __init__(self, store: JobStore, devices: Sequence[DeviceSpec]) -> None:
        self.store = store
        kinds = {"cuda" if device.torch_device.startswith("cuda") else "cpu" for device in devices}
        self.peaks = PeakEstimates(min(kinds, default="cpu"), read_peaks(store.db))
        self.held: dict[str, tuple[ComponentStatus, ...]] = {}
        self.evictions: defaultdict[str, deque[EvictedComponent]] = defaultdict(lambda: deque(maxlen=EVICTIONS_SHOWN))
        self._ways: dict[str, ExecutionMode] = {}
        self._tries: dict[str, JobAttempts] = {}
        self._written: dict[str, object] = {}

    def orders(self, job_id: str, need: Need, device: DeviceState) -> ExecutionMode:
        """How the job is to be run there, for its worker."""
        self._ways[job_id] = mode_for_worker(need, device)
        return self._ways[job_id]

    def way(self, job_id: str) -> ExecutionMode | None:
        return self._ways.get(job_id)

    def forget(self, job_id: str) -> None:
        self._ways.pop(job_id, None)
        self._tries.pop(job_id, None)

    def evicted(self, device: DeviceState, key: str, now: float) -> None:
        names = {held.key: held.name for held in self.held.get(device.id, ())}
        entry = EvictedComponent(key, names.get(key, "?"), dict(device.resident).get(key, 0), now)
        self.evictions[device.id].appendleft(entry)

    def learn(self, job_id: str, model: str, shape: Shape, peaks: Sequence[Peak], now: float) -> list[PeakMeasurement]:
        """Writes the peaks that are larger than any before; the rows are for `peaks.add`, on the event loop."""
        way = self._plain_way(job_id)
        raised = self.peaks.raised(model, way, shape, peaks)
        if not raised:
            return []
        with self.store.database.atomic() as db:
            return record_peaks(db, model, way, shape, self.peaks.device_kind, raised, now)

    def ran_out(
        self, job: Job, need: Need, at: DeviceState, devices: Sequence[DeviceState], now: float, then_fal: bool
    ) -> Need | None:
        """The need for the next try, None if there is none here; `then_fal`: then it goes there. Writes it down."""
        tries = self._tries.get(job.id) or JobAttempts(need)
        failed = Attempt(at.id, self._plain_way(job.id))
        tries = JobAttempts(tries.need, (*tries.failed, failed))
        following = next_attempt(tries.failed, tries.need, devices)
        budget_bytes = at.budget_bytes
        with self.store.database.atomic() as db:
            record_attempt(db, job.id, job.model, failed, following, now, budget_bytes=budget_bytes, then_fal=then_fal)
        self._tries[job.id] = tries
        return restricted_to(tries.need, following) if following else None

    def demote(self, job_id: str, model: str, shape: Shape, at: DeviceState) -> None:
        """A job succeeded in another way than it began in: others like it begin there too."""
        tries = self._tries.get(job_id)
        failed = {rung.way for rung in tries.failed if rung.device == at.id} if tries else set()
        for way in failed - {self._plain_way(job_id)}:
            if tries and tries.need.phases:
                self.peaks.add(self._too_much(model, tries.need, way, shape, at.budget_bytes))

    def recall(self, model: str, need: Need, way: ExecutionMode, shape: Shape, budget_bytes: int) -> None:
        """What `demote` learned from a job like this, on a device with this budget, before the server was restarted."""
        if need.phases:
            self.peaks.add(self._too_much(model, need, way, shape, budget_bytes))

    def _too_much(self, model: str, need: Need, way: ExecutionMode, shape: Shape, budget_bytes: int) -> PeakMeasurement:
        """A peak with which the way just does not fit into the budget."""
        phase = max(need.phases, key=lambda each: need.phase_weights(each, way) + each.bytes_in(way))
        weights_bytes = need.weights_bytes if way.tier == "resident" else need.phase_weights(phase, way)
        working_bytes = max(phase.bytes_in(way), budget_bytes - weights_bytes + 1)
        kind = self.peaks.device_kind
        return PeakMeasurement(
            model, way, phase.name, shape.pixels, shape.frames, kind, working_bytes, working_bytes, 0.0
        )

    def tried(self, job_id: str) -> list[str]:
        """The ways in which the job ran out of memory."""
        failed = self._tries[job_id].failed if job_id in self._tries else ()
        return list(dict.fromkeys(f"{rung.way.name} on {rung.device}" for rung in failed))

    def _plain_way(self, job_id: str) -> ExecutionMode:
        way = self._ways.get(job_id, ExecutionMode())
        return ExecutionMode(way.tier, way.tiled)

    def write_device(self, device: str, state: Mapping[str, Any], now: float) -> None:
        """Writes what `plantain devices` shows, if it has changed but for the job."""
        kept = {name: value for name, value in state.items() if name not in ("status", "runs")}
        if self._written.get(device) != kept:
            with self.store.database.atomic() as db:
                record_device(db, device, state, now)
            self._written[device] = kept

    def rungs(self, device: str) -> list[dict[str, Any]]:
        """Reads the database."""
        return [attempt_json(row) for row in read_attempts(self.store.database.db, device)]

    def state(
        self,
        spec: DeviceSpec,
        view: DeviceState,
        status: str,
        runs: str | None,
        preparation: PrefetchState | None = None,
    ) -> dict[str, Any]:
        """A device for people and programs, but for its rungs. `runs` is the id of the job that it runs."""
        held = sorted(self.held.get(spec.id, ()), key=lambda each: (each.since_at, each.key))
        way = self._ways.get(runs) if runs else None
        return {
            "id": spec.id,
            "name": spec.name,
            "status": status,
            "runs": runs and {"jobId": runs, "way": way.name if way else None},
            "totalBytes": spec.total_bytes,
            "budgetBytes": spec.budget_bytes,
            "othersBytes": view.others_bytes,
            "residentBytes": sum(size for _, size in view.resident),
            "hostBudgetBytes": spec.host_budget_bytes,
            "hostBytes": sum(each.host_bytes for each in held),
            "pageLockedBytes": sum(each.host_bytes for each in held if each.page_locked),
            "linkBytesPerSecond": None if spec.torch_device == "cpu" else view.link_bytes_per_s,
            "components": [component_json(each) for each in held],
            "prefetch": prefetch_json(preparation) if preparation else None,
            "evictions": [
                {"key": each.key, "name": each.name, "bytes": each.size_bytes, "at": iso(each.at)}
                for each in self.evictions[spec.id]
            ],
        }
