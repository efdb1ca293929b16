"""The workers. The dispatcher's: it tells what they are to do, and what they said."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.base import ComponentStatus
from server.dispatch.completion import Endings
from server.dispatch.messages import QueuedJob
from server.dispatch.worker_state import PrefetchState, WorkerState, expect
from server.files.store import FileStore
from server.scheduling import types
from server.scheduling.types import Action, Evict, Prefetch, Refuse, Start
from server.workers import protocol

log = logging.getLogger("plantain.floor")

MAX_RESTART_DELAY_S = 30.0
START_TIMEOUT_S = 300.0
"""A worker that has not said `Ready` by then is killed. On a slow disk torch alone takes a minute to import."""


class Floor:
    """`respawn` is asked to start a device's worker again, after so many seconds."""

    def __init__(self, endings: Endings, files: FileStore, respawn: Callable[[str, float], None]) -> None:
        self.endings, self.files, self.respawn = endings, files, respawn
        self.backlog, self.memory, self.workers = endings.backlog, endings.memory, endings.workers
        self.store, self.write, self.clock = endings.store, endings.write, endings.clock

    @property
    def devices(self) -> list[types.DeviceState]:
        return self.backlog.views(self.workers.values())

    def state(self, worker: WorkerState) -> dict[str, Any]:
        """A worker's device as people and programs see it."""
        runs = worker.runs.job_id if worker.runs else None
        return self.memory.state(worker.supervisor.device, worker.view, worker.status, runs, worker.preparation)

    def seconds_left(self, job_id: str) -> float | None:
        """Until a running job should have ended."""
        ends = [worker.ends_at for worker in self.workers.values() if worker.runs and worker.runs.job_id == job_id]
        return max(0.0, ends[0] - self.clock()) if ends else None

    async def hear(self, worker: WorkerState, event: protocol.Event) -> None:
        match event:
            case protocol.Ready(link_bytes_per_s):
                worker.status, worker.settled = "idle", True
                worker.link_bytes_per_s = link_bytes_per_s or worker.link_bytes_per_s
                await self._show(worker, ())
            case protocol.Progress(job_id):
                worker.status, worker.sign_at = "running", self.clock()
                self.endings.progress[job_id] = event
            case protocol.Resident(components, held):
                worker.told(components, tuple((each.key, each.host_bytes) for each in held if each.host_bytes))
                worker.settled = worker.status == "idle" and not any(each.coming for each in worker.preparations)
                await self._show(worker, held)
            case protocol.Prefetched(job_id, failure):
                await self._prefetched(worker, job_id, failure)
            case protocol.Died(exit_code):
                await self._mourn(worker, exit_code)
            case protocol.Succeeded():
                await self.endings.succeed(worker, event)
            case protocol.Cancelled(job_id):
                await self.endings.cancel(worker, job_id)
            case protocol.Failed():
                await self.endings.fail(worker, event)

    async def perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Evict(device, key):
                    self.memory.evicted(self.workers[device].view, key, self.clock())
                    self.workers[device].supervisor.send(protocol.Evict(key))
                    self.workers[device].forget({key})
                case Prefetch():
                    await self._prefetch(self.workers[action.device], action)
                case Start(job_id, device):
                    await self._start(self.backlog.start(job_id, self.clock()), self.workers[device])
                case Refuse(job_id):
                    await self.endings.refuse(job_id)

    async def hear_driver(self, free_bytes: Mapping[str, int]) -> None:
        """What other programs took of the devices bounds what is planned from now on."""
        for worker in self.workers.values():
            if worker.id in free_bytes:
                worker.hear_driver(free_bytes[worker.id], self.clock())
                await self._show(worker, self.memory.held.get(worker.id, ()))

    def spawn(self, worker: WorkerState) -> None:
        worker.status, worker.sign_at = "starting", self.clock()
        worker.supervisor.start()

    def kill_the_hung(self) -> None:
        """A worker that does not start, or whose job shows no sign of progress, is killed; its death does the rest."""
        for worker in self.workers.values():
            worker.sign_at = min(worker.sign_at, self.clock())  # the clock may have been set back
            if worker.status == "starting" and self.clock() - worker.sign_at > START_TIMEOUT_S:
                log.error("%s: its worker hangs while it starts", worker.id)
                worker.sign_at = self.clock()
                worker.supervisor.kill()
            if worker.runs and not worker.hung and self.clock() - worker.sign_at > worker.hang_s:
                log.error("%s: job %s hangs", worker.id, worker.runs.job_id)
                worker.hung = True
                worker.supervisor.kill()

    def cancel(self, job_id: str) -> None:
        """A running job stops at its next step."""
        for worker in self.workers.values():
            if worker.runs and worker.runs.job_id == job_id:
                worker.cancelling = True
                worker.supervisor.send(protocol.Cancel(job_id))

    async def _start(self, queued: QueuedJob, worker: WorkerState) -> None:
        job = await self.write(self.store.start, queued.job_id, worker.supervisor.device.id, self.clock())
        if job is None:
            self.backlog.ended(queued, 0.0)
            return
        expect(worker, queued, self.clock())
        way = self.memory.orders(job.id, queued.need, worker.view)
        worker.status, worker.runs, worker.cancelling, worker.settled = "loading", queued, False, False
        worker.ahead = None
        worker.forget(queued.need.keys)
        worker.resident += queued.need.components
        output = self.files.path(job.output_name)
        worker.supervisor.send(
            protocol.Run(
                job_id=job.id,
                weights=queued.weights,
                workflow=job.workflow,
                params=job.params,
                files=self.files.root.absolute(),
                output=output.absolute(),
                way=way,
                loras=queued.loras,
            )
        )

    async def _prefetch(self, worker: WorkerState, order: Prefetch) -> None:
        queued = self.backlog.jobs[order.job_id]
        names = {component.key: component.name for component in queued.weights.components}
        to_device = (*worker.late(queued.need), *order.to_device)  # an order takes the place of the one before it
        kinds = [(key, "device") for key in to_device] + [(key, "host") for key in order.to_host]
        components = tuple((key, names.get(key, "?"), queued.need.sizes[key], to) for key, to in kinds)
        worker.prepares(PrefetchState(order.job_id, components))
        worker.supervisor.send(protocol.Prefetch(order.job_id, queued.weights, to_device, order.to_host))
        await self._show(worker, self.memory.held.get(worker.id, ()))

    async def _prefetched(self, worker: WorkerState, job_id: str, failure: str) -> None:
        """No concern of the running job's; what could not be brought the next one loads itself, or fails of."""
        worker.prepared(job_id, failure)
        if failure:
            log.warning("%s: not all that job %s needs came ahead: %s", worker.id, job_id, failure)
        await self._show(worker, self.memory.held.get(worker.id, ()))

    async def _show(self, worker: WorkerState, held: Sequence[ComponentStatus]) -> None:
        """What the worker has, for whoever looks."""
        self.memory.held[worker.id] = tuple(held)
        await self.write(self.memory.write_device, worker.id, self.state(worker), self.clock())

    async def _mourn(self, worker: WorkerState, exit_code: int) -> None:
        """A worker is dead: its job runs again or fails, and another one is started, later after each death."""
        log.warning("worker of %s died with %s", worker.supervisor.device.id, exit_code)
        worker.status, worker.copies = "dead", ()
        worker.lose_all()
        await self._show(worker, ())
        await self.endings.run_again(worker)
        delay_s = min(MAX_RESTART_DELAY_S, 2.0**worker.deaths - 1)
        worker.deaths += 1
        self.respawn(worker.id, delay_s)
