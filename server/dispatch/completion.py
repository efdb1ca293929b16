"""What becomes of jobs: they end, run again, or go on at fal; and what is learned of those that ran."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.base import Peak
from server.dispatch.memory import MemoryTracker
from server.dispatch.messages import QueuedJob
from server.dispatch.queue import JobQueue
from server.dispatch.records import record_timing
from server.dispatch.state import Waiters
from server.dispatch.worker_state import WorkerState
from server.errors import DoesNotFit
from server.jobs.job import Job, error_of
from server.jobs.store import NO_PROGRESS, WORKER_CRASHED, JobStore
from server.scheduling import placement
from server.scheduling.need import Need, shape_of
from server.workers import protocol

log = logging.getLogger("plantain.endings")


class Endings:
    """The dispatcher's. `send_to_fal` starts a job's way through fal; None where nothing can be sent there."""

    def __init__(
        self,
        store: JobStore,
        backlog: JobQueue,
        memory: MemoryTracker,
        watchers: Waiters,
        workers: Mapping[str, WorkerState],
        clock: Callable[[], float],
        send_to_fal: Callable[[Job], None] | None = None,
    ) -> None:
        self.backlog, self.memory, self.watchers, self.workers = backlog, memory, watchers, workers
        self.store, self.write = store, store.database.write
        self.clock, self.send_to_fal = clock, send_to_fal
        self.progress: dict[str, protocol.Progress] = {}

    def done(self, job: Job | None) -> None:
        if job:
            self.progress.pop(job.id, None)
            self.memory.forget(job.id)
            self.watchers.tell(job.id, job)

    async def refuse(self, job_id: str) -> None:
        """What was learned of memory since its submit: no device could hold it. It runs at fal, or fails."""
        dropped = self.backlog.drop(job_id)
        if dropped and await self._hand_over(dropped.job):
            return
        refusal = placement.refusal(dropped.need, self.backlog.views(self.workers.values())) if dropped else ""
        error = error_of(DoesNotFit(f"The job {refusal}."))
        self.done(await self.write(self.store.fail, job_id, error, self.clock()))

    async def succeed(self, worker: WorkerState, said: protocol.Succeeded) -> None:
        await self._learn(worker, said.peaks)
        ran, load_s = worker.runs, worker.load_s
        duration = {"duration": said.duration_s} if said.duration_s else {}
        output = {"width": said.width, "height": said.height} | duration
        await self._end(worker, self.store.succeed, said.job_id, output, self.clock())
        await self._learn_time(ran, max(0.0, said.run_s - load_s))

    async def cancel(self, worker: WorkerState, job_id: str) -> None:
        await self._end(worker, self.store.cancel, job_id, self.clock())

    async def fail(self, worker: WorkerState, said: protocol.Failed) -> None:
        """A job that ran out of memory is tried in another way or place, as long as there is one; fal is the last."""
        message = said.message
        if said.code == "OUT_OF_MEMORY" and worker.runs and await self._goes_on(worker, worker.runs):
            return
        if tried := self.memory.tried(said.job_id):
            message = f"{message} Tried: {'; '.join(tried)}."
        await self._end(worker, self.store.fail, said.job_id, {"error": message, "code": said.code}, self.clock())

    async def run_again(self, worker: WorkerState, need: Need | None = None) -> None:
        """Because its worker died; or, with another `need`, because memory ran out, which is no attempt."""
        queued, worker.runs = worker.runs, None
        error, worker.hung = NO_PROGRESS if worker.hung else WORKER_CRASHED, False
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

    async def learn_remote(self, job: Job) -> None:
        """How long a job took at fal."""
        if timing := self.backlog.learn_remote(job):
            await self.write(record_timing, self.store.db, timing)

    async def _goes_on(self, worker: WorkerState, ran: QueuedJob) -> bool:
        """False if nothing is left for a job that ran out of memory. One that was cancelled meanwhile ends so."""
        worker.lose_all()
        if worker.cancelling:
            await self.cancel(worker, ran.job_id)
        elif need := await self._next_try(worker, ran):
            await self.run_again(worker, need)
            worker.status = "idle"
        elif await self._hand_over(ran.job):
            self._leave(worker)
        else:
            return False
        return True

    async def _next_try(self, worker: WorkerState, queued: QueuedJob) -> Need | None:
        now, job, at = self.clock(), queued.job, worker.view
        devices, then_fal = self.backlog.views(self.workers.values()), self._way_to_fal(job) is not None
        return await self.write(self.memory.ran_out, job, queued.need, at, devices, now, then_fal=then_fal)

    def _way_to_fal(self, job: Job) -> Callable[[Job], None] | None:
        return self.send_to_fal if job.overflow else None

    async def _hand_over(self, job: Job) -> bool:
        """To fal, if it may. A server that dies after it is written down and before it is sent sends it then."""
        send = self._way_to_fal(job)
        remote = await self.write(self.store.move_to_remote, job.id) if send else None
        if send is None or remote is None:
            return False
        log.warning("job %s goes to fal.ai: no device here holds it", job.id)
        self.progress.pop(job.id, None)
        self.memory.forget(job.id)
        send(remote)
        return True

    async def _learn(self, worker: WorkerState, peaks: Sequence[Peak]) -> None:
        """What the run took, for the jobs to come."""
        if worker.runs and peaks:
            job, model = worker.runs.job, worker.runs.weights.model
            shape = shape_of(job.params, job.pixels)
            for row in await self.write(self.memory.learn, job.id, model, shape, peaks, self.clock()):
                self.memory.peaks.add(row)
            self.memory.demote(job.id, model, shape, worker.view)

    async def _learn_time(self, ran: QueuedJob | None, run_s: float) -> None:
        """How long such jobs take, but for the weights that this one had to wait for."""
        if ran:
            await self.write(record_timing, self.store.db, self.backlog.learn(ran, run_s))

    async def _end(self, worker: WorkerState, write: Callable[..., Job | None], *values: Any) -> None:
        job = await self.write(write, *values)
        self._leave(worker)
        self.done(job)

    def _leave(self, worker: WorkerState) -> None:
        """The worker's job is its own no more."""
        if worker.runs:
            self.backlog.ended(worker.runs, max(0.0, self.clock() - worker.started_at))
        worker.status, worker.runs, worker.deaths = "idle", None, 0
