"""Admin routes: the queue and the devices, pausing the one and draining the others."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.accounts.admin import AdminContext
from server.accounts.users import Caller
from server.api.dependencies import Admin, ServicesDep, audited
from server.dispatch import status
from server.errors import NotFound
from server.jobs import store
from server.services import Services
from server.timestamps import iso, iso_or_none

router = APIRouter(prefix="/api/admin")

MAX_JOBS_SHOWN = 200


@router.get("/devices")
async def list_devices(_: Admin, services: ServicesDep) -> JSONResponse:
    """Each device with its budget, components, job, prefetch, evictions and out-of-memory attempts."""
    view, models = services.dispatcher.status, services.registry.users()
    devices: list[dict[str, Any]] = []
    for worker in view.workers.values():
        attempts = await services.database.run(status.oom_attempts, worker.id)
        devices.append({**status.with_models(view.device(worker), models), "oomAttempts": attempts})
    return JSONResponse({"devices": devices})


@router.get("/queue")
async def read_queue(_: Admin, services: ServicesDep) -> JSONResponse:
    """The next jobs, the devices, and the error of predicted starts."""
    view = services.dispatcher.status
    positions = {job_id: position for job_id in view.queue if (position := view.position(job_id))}
    return JSONResponse(
        {
            "paused": view.queue_is_paused,
            "waiting": len(view.queue),
            "jobs": [
                _waiting(services, job_id) for job_id in sorted(positions, key=positions.__getitem__)[:MAX_JOBS_SHOWN]
            ],
            "devices": [_device(services, device) for device in view.workers],
            "startPredictionError": await services.database.run(store.start_prediction_error),
        }
    )


@router.post("/queue/pause")
async def pause(caller: Admin, services: ServicesDep) -> JSONResponse:
    """Nothing starts until the queue is resumed, restarts included. Running jobs finish; new jobs are accepted."""
    await services.dispatcher.pause_queue()
    return await _paused(services, caller, "queue", "queue.pause")


@router.post("/queue/resume")
async def resume(caller: Admin, services: ServicesDep) -> JSONResponse:
    await services.dispatcher.resume_queue()
    return await _paused(services, caller, "queue", "queue.resume")


@router.post("/devices/{device}/drain")
async def drain(device: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    """The device finishes its job and starts nothing until it is resumed."""
    _check_device(services, device)
    await services.dispatcher.drain_device(device)
    return await _paused(services, caller, device, "devices.drain")


@router.post("/devices/{device}/resume")
async def resume_device(device: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    _check_device(services, device)
    await services.dispatcher.resume_device(device)
    return await _paused(services, caller, device, "devices.resume")


async def _paused(services: Services, caller: Caller, subject: str, action: str) -> JSONResponse:
    await audited(services, caller, AdminContext.record, action, subject)
    return JSONResponse({"halted": sorted(services.dispatcher.status.paused)})


def _check_device(services: Services, device: str) -> None:
    workers = services.dispatcher.status.workers
    if device not in workers:
        raise NotFound(f"There is no device {device!r}; there are {', '.join(workers)}.")


def _device(services: Services, device: str) -> dict[str, Any]:
    view = services.dispatcher.status
    worker = view.workers[device]
    return {
        "id": worker.id,
        "status": worker.status,
        "drained": worker.draining,
        "jobId": worker.job.job_id if worker.job else None,
        "userId": worker.job.user_id if worker.job else None,
        "secondsLeft": view.seconds_left(worker.job.job_id) if worker.job else None,
    }


def _waiting(services: Services, job_id: str) -> dict[str, Any]:
    view = services.dispatcher.status
    queued, place = view.queue[job_id], view.place(job_id)
    return {
        "id": job_id,
        "userId": queued.user_id,
        "model": queued.job.model,
        "workflow": queued.job.workflow,
        "priority": queued.priority,
        "createdAt": iso(queued.created_at),
        "position": place and place.position,
        "reason": view.reason(job_id),
        "expectedStartAt": iso_or_none(place.start_at if place else None),
        "expectedSeconds": round(queued.expected_s, 2),
    }
