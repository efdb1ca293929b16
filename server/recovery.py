"""What a server before this one left: its queue, who has had how much, and what ran out of memory."""

from collections.abc import Callable

from server.backlog import Backlog
from server.errors import PlantainError
from server.jobs import Job
from server.memory import Memory
from server.rows import error_of
from server.rungs import Forced, read_forced
from server.shelf import Shelf
from server.store import Store
from server.timings import read_timings
from server.vram import shape_of

REMEMBERED_S = 7 * 86_400.0
"""How long it counts, over restarts, that jobs ran out of memory: what else was on the device may be gone."""
SHARES_S = 86_400.0
"""Who has had how much in this time counts after a restart, too."""


def backlog_of(store: Store, now: float) -> Backlog:
    """Its books, with nothing waiting yet."""
    return Backlog(read_timings(store.db), store.halted(), store.ran(now - SHARES_S))


async def recall(store: Store, shelf: Shelf, memory: Memory, clock: Callable[[], float]) -> None:
    """What ran out of memory, for the needs of the jobs that are taken up next."""
    for forced in await store.call(read_forced, store.db, clock() - REMEMBERED_S):
        _recall(shelf, memory, await store.call(store.job, forced.job_id), forced)


async def take_up(store: Store, shelf: Shelf, backlog: Backlog, clock: Callable[[], float]) -> None:
    """Queue the jobs that have not ended; those whose model is gone fail."""
    for job in await store.call(store.recover, clock()):
        try:
            runnable = shelf.runnable(job.model, job.pixels, job.params, job.weights)
        except PlantainError as gone:
            await store.call(store.fail, job.id, error_of(gone), clock())
        else:
            backlog.add(backlog.queued(job, runnable))


def _recall(shelf: Shelf, memory: Memory, job: Job, forced: Forced) -> None:
    try:
        runnable = shelf.runnable(job.model, job.pixels, job.params, job.weights)
    except PlantainError:
        return  # the model is not here any more
    shape = shape_of(job.params, job.pixels)
    memory.recall(runnable.weights.model, runnable.need, forced.way, shape, forced.budget_bytes)
