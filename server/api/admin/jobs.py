"""Admin routes: the jobs of all users, and their priority in the queue."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import Field

from server.accounts.admin import AdminContext
from server.accounts.users import Caller
from server.api.dependencies import (
    Admin,
    BaseUrl,
    Limit,
    ServicesDep,
    StrictBody,
    admin_caller,
    audited,
    body_of,
    schema_of,
)
from server.api.schemas import job_json, paginated
from server.errors import NotFound
from server.jobs.job import Job
from server.services import Services

router = APIRouter(prefix="/api/admin")

FRONT = 1000
"""The priority of a job that was moved to the front."""


class Priority(StrictBody):
    priority: Annotated[int, Field(ge=-FRONT, le=FRONT)]


@router.get("/jobs")
async def list_jobs(
    _: Admin,
    services: ServicesDep,
    base_url: BaseUrl,
    cursor: str | None = None,
    limit: Limit = 50,
    user: str | None = None,
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] | None = None,
) -> JSONResponse:
    """Newest first."""
    jobs = await services.database.call(services.jobs.jobs, user, cursor, limit, status)
    return JSONResponse(paginated("jobs", [_job_json(services, job, base_url) for job in jobs], limit))


@router.get("/jobs/{job_id}")
async def read_job(job_id: str, _: Admin, services: ServicesDep, base_url: BaseUrl) -> JSONResponse:
    return JSONResponse(_job_json(services, await _job(services, job_id), base_url))


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, caller: Admin, services: ServicesDep, base_url: BaseUrl) -> JSONResponse:
    """As its owner's cancel does. The credits are refunded to the owner."""
    job = await _job(services, job_id)
    if not job.is_final:
        await audited(services, caller, AdminContext.record, "jobs.cancel", job_id, user=job.user_id)
        job = await services.dispatcher.cancel(job_id)
    return JSONResponse(_job_json(services, job, base_url), status_code=200 if job.is_final else 202)


@router.post("/jobs/{job_id}/front")
async def move_to_front(job_id: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    return await _set_priority(services, caller, job_id, FRONT)


@router.post("/jobs/{job_id}/priority", openapi_extra=schema_of(Priority))
async def set_priority(
    job_id: str,
    caller: Admin,
    services: ServicesDep,
    body: Annotated[Priority, Depends(body_of(Priority, admin_caller))],
) -> JSONResponse:
    """A job over zero starts before all others, one under zero after them."""
    return await _set_priority(services, caller, job_id, body.priority)


async def _set_priority(services: Services, caller: Caller, job_id: str, priority: int) -> JSONResponse:
    if job_id not in services.dispatcher.status.queue:
        raise NotFound(f"No job {job_id!r} is waiting.")
    job = await services.dispatcher.set_priority(job_id, priority)
    await audited(services, caller, AdminContext.record, "jobs.priority", job_id, priority=priority)
    return JSONResponse({"id": job.id, "status": job.status, "priority": job.priority})


def _job_json(services: Services, job: Job, base_url: str) -> dict[str, Any]:
    return {**job_json(services, job, base_url), "userId": job.user_id, "keyId": job.key_id}


async def _job(services: Services, job_id: str) -> Job:
    try:
        return await services.database.call(services.jobs.job, job_id)
    except KeyError:
        raise NotFound(f"There is no job {job_id!r}.") from None
