"""What the desk says of the jobs at fal, written down."""

import asyncio
from typing import TypeVar

from server import protocol
from server.endings import Endings
from server.remote import errand
from server.rows import error_of
from server.scribe import Scribe

T = TypeVar("T")


async def hear(said: errand.Said, scribe: Scribe, endings: Endings, now: float) -> None:
    store = scribe.store
    match said:
        case errand.HandingOver(job_id, written):
            _answer(written, await scribe.write(store.start_remote, job_id, now))
        case errand.HandedOver(job_id, request_id, kept):
            await scribe.write(store.keep_request_id, job_id, request_id)
            _answer(kept, None)
        case protocol.Progress(job_id):
            endings.progress[job_id] = said
        case errand.Finished(job_id, made):
            if job := await scribe.write(store.succeed, job_id, made.output, now, made.name):
                await endings.learn_remote(job)
                endings.done(job)
        case protocol.Cancelled(job_id):
            endings.done(await scribe.write(store.cancel, job_id, now))
        case errand.Broken(job_id, error):
            endings.done(await scribe.write(store.fail, job_id, error_of(error), now))


def _answer(future: asyncio.Future[T], result: T) -> None:
    """Whoever asked may have been stopped meanwhile."""
    if not future.done():
        future.set_result(result)
