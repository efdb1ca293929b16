"""The workers, and what becomes of the jobs that they run. The dispatcher's: it tells what to do and what was said."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.base import Held, Peak
from server import protocol, scheduler
from server.backlog import Backlog
from server.errors import DoesNotFit
from server.jobs import Job
from server.memory import Memory
from server.outputs import Files
from server.roster import Preparation, Queued, Worker
from server.rows import HUNG, INTERRUPTED, error_of
from server.scheduler import Action, Evict, Prefetch, Refuse, Start
from server.scribe import Scribe
from server.timings import hang_s, record_timing
from server.vram import Need, shape_of
from server.watchers import Watchers

log = logging.getLogger("plantain.floor")

LONGEST_RESPAWN_DELAY_S = 30.0
START_PATIENCE_S = 300.0
"""A worker that has not said `Ready` by then is killed. On a slow disk torch alone takes a minute to import."""


class Floor:
    """`respawn` is asked to start a device's worker again, after so many seconds.

    `send_to_fal` starts a job's way through fal; None where nothing can be sent there.
    """

    def __init__(
        self,
        scribe: Scribe,
        files: Files,
        backlog: Backlog,
        memory: Memory,
        watchers: Watchers,
        clock: Callable[[], float],
        respawn: Callable[[str, float], None],
        send_to_fal: Callable[[Job], None] | None = None,
    ) -> None:
        self.scribe, self.files, self.backlog, self.memory, self.watchers = scribe, files, backlog, memory, watchers
        self.store, self.write = scribe.store, scribe.write
        self.clock, self.respawn, self.send_to_fal = clock, respawn, send_to_fal
        self.workers: dict[str, Worker] = {}
        self.progress: dict[str, protocol.Progress] = {}

    @property
    def devices(self) -> list[scheduler.Device]:
        return [self.backlog.view(worker) for worker in self.workers.values()]

    def state(self, worker: Worker) -> dict[str, Any]:
        """A worker's device as people and programs see it."""
        runs = worker.runs.job_id if worker.runs else None
        return self.memory.state(worker.supervisor.device, worker.view, worker.status, runs, worker.preparation)

    def seconds_left(self, job_id: str) -> float | None:
        """Until a running job should have ended."""
        ends = [worker.ends_at for worker in self.workers.values() if worker.runs and worker.runs.job_id == job_id]
        return max(0.0, ends[0] - self.clock()) if ends else None

    async def hear(self, worker: Worker, event: protocol.Event) -> None:
        match event:
            case protocol.Ready(link_bytes_per_s):
                worker.status, worker.settled = "idle", True
                worker.link_bytes_per_s = link_bytes_per_s or worker.link_bytes_per_s
                await self._show(worker, ())
            case protocol.Progress(job_id):
                worker.status, worker.sign_at = "running", self.clock()
                self.progress[job_id] = event
            case protocol.Resident(components, held):
                worker.told(components, tuple((each.key, each.host_bytes) for each in held if each.host_bytes))
                worker.settled = worker.status == "idle" and not any(each.coming for each in worker.preparations)
                await self._show(worker, held)
            case protocol.Prefetched(job_id, failure):
                await self._prefetched(worker, job_id, failure)
            case protocol.Died(exit_code):
                await self._mourn(worker, exit_code)
            case protocol.Succeeded(job_id, width, height, run_s, duration_s, peaks):
                await self._learn(worker, peaks)
                ran, load_s = worker.runs, worker.load_s
                output = {"width": width, "height": height} | ({"duration": duration_s} if duration_s else {})
                await self._end(worker, self.store.succeed, job_id, output, self.clock())
                await self._learn_time(ran, max(0.0, run_s - load_s))
            case protocol.Cancelled(job_id):
                await self._end(worker, self.store.cancel, job_id, self.clock())
            case protocol.Failed(job_id, code, message):
                await self._fail(worker, job_id, code, message)

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
                    await self._refuse(job_id)

    async def hear_driver(self, free_bytes: Mapping[str, int]) -> None:
        """What other programs took of the devices bounds what is planned from now on."""
        for worker in self.workers.values():
            if worker.id in free_bytes:
                worker.hear_driver(free_bytes[worker.id], self.clock())
                await self._show(worker, self.memory.held.get(worker.id, ()))

    def spawn(self, worker: Worker) -> None:
        worker.status, worker.sign_at = "starting", self.clock()
        worker.supervisor.start()

    def kill_the_hung(self) -> None:
        """A worker that does not start, or whose job shows no sign of progress, is killed; its death does the rest."""
        for worker in self.workers.values():
            worker.sign_at = min(worker.sign_at, self.clock())  # the clock may have been set back
            if worker.status == "starting" and self.clock() - worker.sign_at > START_PATIENCE_S:
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

    def done(self, job: Job | None) -> None:
        if job:
            self.progress.pop(job.id, None)
            self.memory.forget(job.id)
            self.watchers.tell(job.id, job)

    async def _start(self, queued: Queued, worker: Worker) -> None:
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

    async def _prefetch(self, worker: Worker, order: Prefetch) -> None:
        queued = self.backlog.jobs[order.job_id]
        names = {component.key: component.name for component in queued.weights.components}
        to_device = (*worker.late(queued.need), *order.to_device)  # an order takes the place of the one before it
        kinds = [(key, "device") for key in to_device] + [(key, "host") for key in order.to_host]
        components = tuple((key, names.get(key, "?"), queued.need.sizes[key], to) for key, to in kinds)
        worker.prepares(Preparation(order.job_id, components))
        worker.supervisor.send(protocol.Prefetch(order.job_id, queued.weights, to_device, order.to_host))
        await self._show(worker, self.memory.held.get(worker.id, ()))

    async def _prefetched(self, worker: Worker, job_id: str, failure: str) -> None:
        """No concern of the running job's; what could not be brought the next one loads itself, or fails of."""
        worker.prepared(job_id, failure)
        if failure:
            log.warning("%s: not all that job %s needs came ahead: %s", worker.id, job_id, failure)
        await self._show(worker, self.memory.held.get(worker.id, ()))

    async def _refuse(self, job_id: str) -> None:
        """What was learned of memory since its submit: no device could hold it. It runs at fal, or fails."""
        dropped = self.backlog.drop(job_id)
        if dropped and await self._hand_over(dropped.job):
            return
        refusal = scheduler.refusal(dropped.need, self.devices) if dropped else ""
        error = error_of(DoesNotFit(f"The job {refusal}."))
        self.done(await self.write(self.store.fail, job_id, error, self.clock()))

    async def _fail(self, worker: Worker, job_id: str, code: str, message: str) -> None:
        """A job that ran out of memory is tried in another way or place, as long as there is one; fal is the last."""
        if code == "OUT_OF_MEMORY" and worker.runs and await self._goes_on(worker, worker.runs):
            return
        if tried := self.memory.tried(job_id):
            message = f"{message} Tried: {'; '.join(tried)}."
        await self._end(worker, self.store.fail, job_id, {"error": message, "code": code}, self.clock())

    async def _goes_on(self, worker: Worker, ran: Queued) -> bool:
        """False if nothing is left for a job that ran out of memory. One that was cancelled meanwhile ends so."""
        worker.lose_all()
        if worker.cancelling:
            await self._end(worker, self.store.cancel, ran.job_id, self.clock())
        elif need := await self._next_try(worker, ran):
            await self._run_again(worker, need)
            worker.status = "idle"
        elif await self._hand_over(ran.job):
            self._leave(worker)
        else:
            return False
        return True

    async def _next_try(self, worker: Worker, queued: Queued) -> Need | None:
        now, job, at = self.clock(), queued.job, worker.view
        return await self.write(
            self.memory.ran_out, job, queued.need, at, self.devices, now, then_fal=self._way_to_fal(job) is not None
        )

    def _way_to_fal(self, job: Job) -> Callable[[Job], None] | None:
        return self.send_to_fal if job.overflow else None

    async def _hand_over(self, job: Job) -> bool:
        """To fal, if it may. A server that dies after it is written down and before it is sent sends it then."""
        send = self._way_to_fal(job)
        remote = await self.write(self.store.hand_over, job.id) if send else None
        if send is None or remote is None:
            return False
        log.warning("job %s goes to fal.ai: no device here holds it", job.id)
        self.progress.pop(job.id, None)
        self.memory.forget(job.id)
        send(remote)
        return True

    async def _learn(self, worker: Worker, peaks: Sequence[Peak]) -> None:
        """What the run took, for the jobs to come."""
        if worker.runs and peaks:
            job, model = worker.runs.job, worker.runs.weights.model
            shape = shape_of(job.params, job.pixels)
            for row in await self.write(self.memory.learn, job.id, model, shape, peaks, self.clock()):
                self.memory.peaks.add(row)
            self.memory.demote(job.id, model, shape, worker.view)

    async def _learn_time(self, ran: Queued | None, run_s: float) -> None:
        """How long such jobs take, but for the weights that this one had to wait for."""
        if ran:
            await self.write(record_timing, self.store.db, self.backlog.learn(ran, run_s))

    async def learn_remote(self, job: Job) -> None:
        """How long a job took at fal."""
        if timing := self.backlog.learn_remote(job):
            await self.write(record_timing, self.store.db, timing)

    async def _show(self, worker: Worker, held: Sequence[Held]) -> None:
        """What the worker has, for whoever looks."""
        self.memory.held[worker.id] = tuple(held)
        await self.write(self.memory.write_device, worker.id, self.state(worker), self.clock())

    async def _mourn(self, worker: Worker, exit_code: int) -> None:
        """A worker is dead: its job runs again or fails, and another one is started, later after each death."""
        log.warning("worker of %s died with %s", worker.supervisor.device.id, exit_code)
        worker.status, worker.copies = "dead", ()
        worker.lose_all()
        await self._show(worker, ())
        await self._run_again(worker)
        delay_s = min(LONGEST_RESPAWN_DELAY_S, 2.0**worker.deaths - 1)
        worker.deaths += 1
        self.respawn(worker.id, delay_s)

    async def _run_again(self, worker: Worker, need: Need | None = None) -> None:
        """Because its worker died; or, with another `need`, because memory ran out, which is no attempt."""
        queued, worker.runs = worker.runs, None
        error, worker.hung = HUNG if worker.hung else INTERRUPTED, False
        if queued is None:
            return
        self.progress.pop(queued.job_id, None)
        job = await self.write(self.store.requeue, queued.job_id, self.clock(), count_attempt=need is None, error=error)
        if job and not job.is_final:
            again = replace(queued, need=need or queued.need, job=job)
            self.backlog.add_back(again)
        else:
            self.backlog.ended(queued, 0.0)
            self.done(job)

    async def _end(self, worker: Worker, write: Callable[..., Job | None], *values: Any) -> None:
        job = await self.write(write, *values)
        self._leave(worker)
        self.done(job)

    def _leave(self, worker: Worker) -> None:
        """The worker's job is its own no more."""
        if worker.runs:
            self.backlog.ended(worker.runs, max(0.0, self.clock() - worker.started_at))
        worker.status, worker.runs, worker.deaths = "idle", None, 0


def expect(worker: Worker, queued: Queued, now: float) -> None:
    """When the job that starts here should have ended, and when it hangs."""
    missing_bytes = worker.missing_bytes(queued.need)
    worker.load_s = missing_bytes / worker.link_bytes_per_s
    worker.started_at = worker.sign_at = now
    worker.ends_at = now + worker.load_s + queued.expected_s
    worker.hang_s = hang_s(queued.expected_s, missing_bytes)
