"""What the desk says of the jobs at fal, written down."""

import asyncio
from typing import TypeVar

from server.dispatch.completion import Endings
from server.jobs.job import error_of
from server.jobs.store import JobStore
from server.remote.job import RemoteJobEvent, RemoteJobFailed, RemoteSucceeded, SubmitStarted, Submitted
from server.workers import protocol

T = TypeVar("T")


async def on_remote_event(said: RemoteJobEvent, store: JobStore, endings: Endings, now: float) -> None:
    database = store.database
    match said:
        case SubmitStarted(job_id, written):
            _answer(written, await database.write(store.start_remote, job_id, now))
        case Submitted(job_id, request_id, kept):
            await database.write(store.keep_request_id, job_id, request_id)
            _answer(kept, None)
        case protocol.Progress(job_id):
            endings.progress[job_id] = said
        case RemoteSucceeded(job_id, made):
            if job := await database.write(store.succeed, job_id, made.output, now, made.name):
                await endings.learn_remote(job)
                endings.done(job)
        case protocol.Cancelled(job_id):
            endings.done(await database.write(store.cancel, job_id, now))
        case RemoteJobFailed(job_id, error):
            endings.done(await database.write(store.fail, job_id, error_of(error), now))


def _answer(future: asyncio.Future[T], result: T) -> None:
    """Whoever asked may have been stopped meanwhile."""
    if not future.done():
        future.set_result(result)
