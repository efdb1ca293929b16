"""Running the server: the queue as it stands, pausing it, taking devices out, and who goes first."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import Field

from server import audit, promises
from server.accounts import Caller
from server.api.admin import Order
from server.api.common import Admin, Served, admin, body_of, schema_of
from server.backlog import QUEUE
from server.clock import iso, iso_or_none
from server.errors import NotFound
from server.services import Services

router = APIRouter(prefix="/api/admin")

SHOWN = 200
FRONT = 1000
"""The priority of a job that was moved to the front."""


class Priority(Order):
    priority: Annotated[int, Field(ge=-FRONT, le=FRONT)]


@router.get("/queue")
async def read_queue(_: Admin, served: Served) -> JSONResponse:
    """The next jobs, the devices, and how well expected starts were kept."""
    dispatcher = served.dispatcher
    places = {job_id: place for job_id in dispatcher.queue if (place := dispatcher.place(job_id))}
    nearest = sorted(places, key=lambda job_id: places[job_id].position)[:SHOWN]
    return JSONResponse(
        {
            "paused": QUEUE in dispatcher.backlog.halted,
            "waiting": len(dispatcher.queue),
            "jobs": [_waiting(served, job_id) for job_id in nearest],
            "devices": [
                {
                    "id": worker.id,
                    "status": worker.status,
                    "drained": worker.halted,
                    "jobId": worker.runs.job_id if worker.runs else None,
                    "userId": worker.runs.user_id if worker.runs else None,
                    "secondsLeft": dispatcher.seconds_left(worker.runs.job_id) if worker.runs else None,
                }
                for worker in dispatcher.workers.values()
            ],
            "promises": await served.store.call(promises.kept, served.store.db),
        }
    )


@router.post("/queue/pause")
async def pause(caller: Admin, served: Served) -> JSONResponse:
    """Nothing starts until it is resumed, restarts or not. What runs, runs on; new jobs are taken."""
    return await _halt(served, caller, QUEUE, True, "queue.pause")


@router.post("/queue/resume")
async def resume(caller: Admin, served: Served) -> JSONResponse:
    return await _halt(served, caller, QUEUE, False, "queue.resume")


@router.post("/devices/{device}/drain")
async def drain(device: str, caller: Admin, served: Served) -> JSONResponse:
    """The device ends what it runs and starts nothing more, until it is resumed."""
    return await _halt(served, caller, device, True, "devices.drain")


@router.post("/devices/{device}/resume")
async def resume_device(device: str, caller: Admin, served: Served) -> JSONResponse:
    return await _halt(served, caller, device, False, "devices.resume")


@router.post("/jobs/{job_id}/front")
async def move_to_front(job_id: str, caller: Admin, served: Served) -> JSONResponse:
    return await _prioritise(served, caller, job_id, FRONT)


@router.post("/jobs/{job_id}/priority", openapi_extra=schema_of(Priority))
async def prioritise(
    job_id: str, caller: Admin, served: Served, body: Annotated[Priority, Depends(body_of(Priority, admin))]
) -> JSONResponse:
    """Over zero goes before all others, under zero behind them."""
    return await _prioritise(served, caller, job_id, body.priority)


async def _halt(served: Services, caller: Caller, what: str, on: bool, act: str) -> JSONResponse:
    if what != QUEUE and what not in served.dispatcher.workers:
        raise NotFound(f"There is no device {what!r}; there are {', '.join(served.dispatcher.workers)}.")
    await served.dispatcher.halt(what, on)
    await _note(served, caller, act, what)
    return JSONResponse({"halted": sorted(served.dispatcher.backlog.halted)})


async def _prioritise(served: Services, caller: Caller, job_id: str, priority: int) -> JSONResponse:
    if job_id not in served.dispatcher.queue:
        raise NotFound(f"No job {job_id!r} waits here.")
    job = await served.dispatcher.prioritise(job_id, priority)
    await _note(served, caller, "jobs.priority", job_id, priority=priority)
    return JSONResponse({"id": job.id, "status": job.status, "priority": job.priority})


async def _note(served: Services, caller: Caller, act: str, subject: str, **detail: Any) -> None:
    def write() -> None:
        with served.store.atomic() as db:
            audit.note(db, audit.Actor.of(caller), act, subject, served.clock(), **detail)

    await served.store.call(write)


def _waiting(served: Services, job_id: str) -> dict[str, Any]:
    queued, place = served.dispatcher.queue[job_id], served.dispatcher.place(job_id)
    return {
        "id": job_id,
        "userId": queued.user_id,
        "model": queued.job.model,
        "workflow": queued.job.workflow,
        "priority": queued.priority,
        "createdAt": iso(queued.created_at),
        "position": place and place.position,
        "reason": served.dispatcher.reason(job_id),
        "expectedStartAt": iso_or_none(place.start_at if place else None),
        "expectedSeconds": round(queued.expected_s, 2),
    }
