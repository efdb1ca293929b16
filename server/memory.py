"""What the dispatcher knows of memory: peaks, tries that ran out, evictions, and what each worker said it holds."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.base import Held, Peak, Way
from server.clock import iso
from server.devices import DeviceSpec
from server.jobs import Job
from server.ladder import Rung, bound, next_rung
from server.peaks import Measured, Peaks, read_peaks, record_peaks
from server.placement import Device, orders
from server.roster import Preparation
from server.rungs import read_rungs, record_device, record_rung
from server.store import Store
from server.vram import Need, Shape

EVICTIONS_SHOWN = 20


@dataclass(frozen=True)
class Evicted:
    """A component that made room for another job's."""

    key: str
    name: str
    size_bytes: int
    at: float


@dataclass(frozen=True)
class Tries:
    """A job's need as at its submit, and the tries that ran out of memory."""

    need: Need
    failed: tuple[Rung, ...] = ()


class Memory:
    """Owned by the dispatcher. What writes to the database says so; those are to be called off the event loop."""

    def __init__(self, store: Store, devices: Sequence[DeviceSpec]) -> None:
        self.store = store
        kinds = {"cuda" if device.torch_device.startswith("cuda") else "cpu" for device in devices}
        self.peaks = Peaks(min(kinds, default="cpu"), read_peaks(store.db))
        self.held: dict[str, tuple[Held, ...]] = {}
        self.evictions: defaultdict[str, deque[Evicted]] = defaultdict(lambda: deque(maxlen=EVICTIONS_SHOWN))
        self._ways: dict[str, Way] = {}
        self._tries: dict[str, Tries] = {}
        self._written: dict[str, object] = {}

    def orders(self, job_id: str, need: Need, device: Device) -> Way:
        """How the job is to be run there, for its worker."""
        self._ways[job_id] = orders(need, device)
        return self._ways[job_id]

    def way(self, job_id: str) -> Way | None:
        return self._ways.get(job_id)

    def forget(self, job_id: str) -> None:
        self._ways.pop(job_id, None)
        self._tries.pop(job_id, None)

    def evicted(self, device: Device, key: str, now: float) -> None:
        names = {held.key: held.name for held in self.held.get(device.id, ())}
        entry = Evicted(key, names.get(key, "?"), dict(device.resident).get(key, 0), now)
        self.evictions[device.id].appendleft(entry)

    def learn(self, job_id: str, model: str, shape: Shape, peaks: Sequence[Peak], now: float) -> list[Measured]:
        """Writes the peaks that are larger than any before; the rows are for `peaks.add`, on the event loop."""
        way = self._plain_way(job_id)
        raised = self.peaks.raised(model, way, shape, peaks)
        if not raised:
            return []
        with self.store.atomic() as db:
            return record_peaks(db, model, way, shape, self.peaks.device_kind, raised, now)

    def ran_out(
        self, job: Job, need: Need, at: Device, devices: Sequence[Device], now: float, then_fal: bool
    ) -> Need | None:
        """The need for the next try, None if there is none here; `then_fal`: then it goes there. Writes it down."""
        tries = self._tries.get(job.id) or Tries(need)
        failed = Rung(at.id, self._plain_way(job.id))
        tries = Tries(tries.need, (*tries.failed, failed))
        following = next_rung(tries.failed, tries.need, devices)
        budget_bytes = at.budget_bytes
        with self.store.atomic() as db:
            record_rung(db, job.id, job.model, failed, following, now, budget_bytes=budget_bytes, then_fal=then_fal)
        self._tries[job.id] = tries
        return bound(tries.need, following) if following else None

    def demote(self, job_id: str, model: str, shape: Shape, at: Device) -> None:
        """A job succeeded in another way than it began in: others like it begin there too."""
        tries = self._tries.get(job_id)
        failed = {rung.way for rung in tries.failed if rung.device == at.id} if tries else set()
        for way in failed - {self._plain_way(job_id)}:
            if tries and tries.need.phases:
                self.peaks.add(self._too_much(model, tries.need, way, shape, at.budget_bytes))

    def recall(self, model: str, need: Need, way: Way, shape: Shape, budget_bytes: int) -> None:
        """What `demote` learned from a job like this, on a device with this budget, before the server was restarted."""
        if need.phases:
            self.peaks.add(self._too_much(model, need, way, shape, budget_bytes))

    def _too_much(self, model: str, need: Need, way: Way, shape: Shape, budget_bytes: int) -> Measured:
        """A peak with which the way just does not fit into the budget."""
        phase = max(need.phases, key=lambda each: need.phase_weights(each, way) + each.bytes_in(way))
        weights_bytes = need.weights_bytes if way.tier == "resident" else need.phase_weights(phase, way)
        working_bytes = max(phase.bytes_in(way), budget_bytes - weights_bytes + 1)
        kind = self.peaks.device_kind
        return Measured(model, way, phase.name, shape.pixels, shape.frames, kind, working_bytes, working_bytes, 0.0)

    def tried(self, job_id: str) -> list[str]:
        """The ways in which the job ran out of memory."""
        failed = self._tries[job_id].failed if job_id in self._tries else ()
        return list(dict.fromkeys(f"{rung.way.name} on {rung.device}" for rung in failed))

    def _plain_way(self, job_id: str) -> Way:
        way = self._ways.get(job_id, Way())
        return Way(way.tier, way.tiled)

    def write_device(self, device: str, state: Mapping[str, Any], now: float) -> None:
        """Writes what `plantain devices` shows, if it has changed but for the job."""
        kept = {name: value for name, value in state.items() if name not in ("status", "runs")}
        if self._written.get(device) != kept:
            with self.store.atomic() as db:
                record_device(db, device, state, now)
            self._written[device] = kept

    def rungs(self, device: str) -> list[dict[str, Any]]:
        """Reads the database."""
        return [rung_json(row) for row in read_rungs(self.store.db, device)]

    def state(
        self, spec: DeviceSpec, view: Device, status: str, runs: str | None, preparation: Preparation | None = None
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
            "prefetch": preparation_json(preparation) if preparation else None,
            "evictions": [
                {"key": each.key, "name": each.name, "bytes": each.size_bytes, "at": iso(each.at)}
                for each in self.evictions[spec.id]
            ],
        }


def rung_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "jobId": row["job_id"],
        "model": row["model"],
        "way": row["way"],
        "nextDevice": row["next_device"],
        "nextWay": row["next_way"],
        "at": iso(row["failed_at"]),
    }


def preparation_json(preparation: Preparation) -> dict[str, Any]:
    """What the device brings for a waiting job, or has brought last."""
    return {
        "jobId": preparation.job_id,
        "ended": preparation.ended,
        "failure": preparation.failure or None,
        "components": [
            {"key": key, "name": name, "bytes": size, "to": to} for key, name, size, to in preparation.components
        ],
    }


def component_json(held: Held) -> dict[str, Any]:
    return {
        "key": held.key,
        "name": held.name,
        "bytes": held.device_bytes,
        "hostBytes": held.host_bytes,
        "pageLocked": held.page_locked,
        "streamed": held.streamed,
        "since": iso(held.since_at),
    }


def with_models(state: dict[str, Any], models: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The state with the models that use each component, by its key."""
    components = [{**each, "models": list(models.get(each["key"], ()))} for each in state["components"]]
    return {**state, "components": components}
