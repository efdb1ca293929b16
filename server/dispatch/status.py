"""Read-only views of the dispatcher's state, for the API and the command line."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.base import ComponentStatus
from server.db.database import Connection
from server.dispatch.memory import MemoryTracker
from server.dispatch.messages import QueuedJob
from server.dispatch.queue import WHOLE_QUEUE
from server.dispatch.records import read_attempts
from server.dispatch.state import State
from server.dispatch.worker_state import PrefetchState, WorkerState
from server.scheduling.forecast import QueuePosition
from server.timestamps import iso
from server.workers import protocol
from server.workers.devices import DeviceSpec


class Status:
    """What others may see of the queue, the running jobs and the devices."""

    def __init__(self, state: State, clock: Callable[[], float]) -> None:
        self._state, self._clock = state, clock

    @property
    def queue(self) -> Mapping[str, QueuedJob]:
        """The waiting jobs, in the order in which they were submitted."""
        return self._state.queue.jobs

    @property
    def progress(self) -> Mapping[str, protocol.Progress]:
        return self._state.progress

    @property
    def paused(self) -> frozenset[str]:
        """Devices that are draining, and `WHOLE_QUEUE` if the queue is paused."""
        return frozenset(self._state.queue.paused)

    @property
    def queue_is_paused(self) -> bool:
        return WHOLE_QUEUE in self._state.queue.paused

    @property
    def workers(self) -> Mapping[str, WorkerState]:
        return self._state.workers

    @property
    def specs(self) -> list[DeviceSpec]:
        return [worker.supervisor.device for worker in self._state.workers.values()]

    @property
    def serving(self) -> bool:
        """Whether a worker can run a job now."""
        return any(worker.status in ("idle", "loading", "running") for worker in self._state.workers.values())

    def seconds_left(self, job_id: str) -> float | None:
        """Until a running job should have ended."""
        for worker in self._state.workers.values():
            if worker.job and worker.job.job_id == job_id:
                return max(0.0, worker.expected_end_at - self._clock())
        return None

    def position(self, job_id: str) -> int | None:
        """1 for the job that is next; None for one that does not wait."""
        place = self.place(job_id)
        return place.position if place else None

    def place(self, job_id: str) -> QueuePosition | None:
        """Where a job stands in the queue, and when it should start; None for one that does not wait."""
        if job_id not in self._state.queue.jobs:
            return None
        return self._state.queue.positions(list(self._state.workers.values()), self._clock())[job_id]

    def reason(self, job_id: str) -> str | None:
        """Why a job waits, for a person."""
        if self._state.draining:
            return "the server is stopping; the job goes on when it is back"
        queued = self._state.queue.jobs.get(job_id)
        workers = list(self._state.workers.values())
        return self._state.queue.wait_reason(queued, workers, self._clock()) if queued else None

    def device(self, worker: WorkerState) -> dict[str, Any]:
        """A device as JSON, without its out-of-memory attempts, which are in the database."""
        return device_json(self._state.memory, worker)


def device_json(memory: MemoryTracker, worker: WorkerState) -> dict[str, Any]:
    spec, snapshot = worker.supervisor.device, worker.snapshot
    held = sorted(memory.held.get(spec.id, ()), key=lambda each: (each.since_at, each.key))
    mode = memory.mode_of(worker.job.job_id) if worker.job else None
    return {
        "id": spec.id,
        "name": spec.name,
        "status": worker.status,
        "runs": {"jobId": worker.job.job_id, "mode": mode.name if mode else None} if worker.job else None,
        "totalBytes": spec.total_bytes,
        "budgetBytes": spec.budget_bytes,
        "othersBytes": snapshot.external_bytes,
        "residentBytes": sum(size for _, size in snapshot.resident),
        "hostBudgetBytes": spec.host_budget_bytes,
        "hostBytes": sum(each.host_bytes for each in held),
        "pageLockedBytes": sum(each.host_bytes for each in held if each.page_locked),
        "linkBytesPerSecond": None if spec.torch_device == "cpu" else snapshot.link_bytes_per_s,
        "components": [component_json(each) for each in held],
        "prefetch": prefetch_json(worker.prefetch) if worker.prefetch else None,
        "evictions": [
            {"key": each.key, "name": each.name, "bytes": each.size_bytes, "at": iso(each.at)}
            for each in memory.evictions[spec.id]
        ],
    }


def oom_attempts(db: Connection, device: str) -> list[dict[str, Any]]:
    """The last out-of-memory attempts on a device, newest first."""
    return [attempt_json(row) for row in read_attempts(db, device)]


def attempt_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "jobId": row["job_id"],
        "model": row["model"],
        "mode": row["way"],
        "nextDevice": row["next_device"],
        "nextMode": row["next_way"],
        "at": iso(row["failed_at"]),
    }


def prefetch_json(prefetch: PrefetchState) -> dict[str, Any]:
    """The prefetch under way, or the last one."""
    return {
        "jobId": prefetch.job_id,
        "ended": prefetch.done,
        "failure": prefetch.error or None,
        "components": [
            {"key": key, "name": name, "bytes": size, "to": to} for key, name, size, to in prefetch.components
        ],
    }


def component_json(held: ComponentStatus) -> dict[str, Any]:
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
