"""Running the server: the queue as it stands, pausing it, taking devices out, and who goes first."""
# FROM server.api.devices: What each device has: its budget, the components on it and in host memory, what it runs, what had to go or failed.

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.accounts.users import Caller
from server.api.dependencies import Admin, ServicesDep, _note
from server.dispatch.queue import WHOLE_QUEUE
from server.dispatch.status import with_models
from server.errors import NotFound
from server.jobs import store
from server.services import Services
from server.timestamps import iso, iso_or_none

router = APIRouter(prefix="/api/admin")


@router.get("/devices")
async def list_devices(_: Admin, services: ServicesDep) -> JSONResponse:
    dispatcher, models = services.dispatcher, services.registry.users()
    devices: list[dict[str, Any]] = []
    for worker in dispatcher.workers.values():
        rungs = await services.database.call(dispatcher.memory.rungs, worker.id)
        devices.append({**with_models(dispatcher.state(worker), models), "rungs": rungs})
    return JSONResponse({"devices": devices})


SHOWN = 200


@router.get("/queue")
async def read_queue(_: Admin, services: ServicesDep) -> JSONResponse:
    """The next jobs, the devices, and how well expected starts were kept."""
    dispatcher = services.dispatcher
    places = {job_id: place for job_id in dispatcher.queue if (place := dispatcher.place(job_id))}
    nearest = sorted(places, key=lambda job_id: places[job_id].position)[:SHOWN]
    return JSONResponse(
        {
            "paused": WHOLE_QUEUE in dispatcher.backlog.halted,
            "waiting": len(dispatcher.queue),
            "jobs": [_waiting(services, job_id) for job_id in nearest],
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
            "promises": await services.database.run(store.start_prediction_error),
        }
    )


@router.post("/queue/pause")
async def pause(caller: Admin, services: ServicesDep) -> JSONResponse:
    """Nothing starts until it is resumed, restarts or not. What runs, runs on; new jobs are taken."""
    return await _halt(services, caller, WHOLE_QUEUE, True, "queue.pause")


@router.post("/queue/resume")
async def resume(caller: Admin, services: ServicesDep) -> JSONResponse:
    return await _halt(services, caller, WHOLE_QUEUE, False, "queue.resume")


@router.post("/devices/{device}/drain")
async def drain(device: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    """The device ends what it runs and starts nothing more, until it is resumed."""
    return await _halt(services, caller, device, True, "devices.drain")


@router.post("/devices/{device}/resume")
async def resume_device(device: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    return await _halt(services, caller, device, False, "devices.resume")


async def _halt(services: Services, caller: Caller, what: str, on: bool, act: str) -> JSONResponse:
    if what != WHOLE_QUEUE and what not in services.dispatcher.workers:
        raise NotFound(f"There is no device {what!r}; there are {', '.join(services.dispatcher.workers)}.")
    await services.dispatcher.halt(what, on)
    await _note(services, caller, act, what)
    return JSONResponse({"halted": sorted(services.dispatcher.backlog.halted)})


def _waiting(services: Services, job_id: str) -> dict[str, Any]:
    queued, place = services.dispatcher.queue[job_id], services.dispatcher.place(job_id)
    return {
        "id": job_id,
        "userId": queued.user_id,
        "model": queued.job.model,
        "workflow": queued.job.workflow,
        "priority": queued.priority,
        "createdAt": iso(queued.created_at),
        "position": place and place.position,
        "reason": services.dispatcher.reason(job_id),
        "expectedStartAt": iso_or_none(place.start_at if place else None),
        "expectedSeconds": round(queued.expected_s, 2),
    }
