"""Routes of the caller's own jobs: list, read, cancel."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.accounts.users import Caller
from server.api.dependencies import BaseUrl, CancellingCaller, CurrentCaller, Limit, ServicesDep
from server.api.schemas import job_json, paginated, weights_header
from server.errors import NotFound
from server.jobs.job import Job
from server.services import Services

router = APIRouter()


@router.get("/api/jobs")
async def list_jobs(
    caller: CurrentCaller,
    services: ServicesDep,
    base_url: BaseUrl,
    cursor: str | None = None,
    limit: Limit = 50,
) -> JSONResponse:
    """The caller's jobs, newest first."""
    jobs = await services.database.call(services.jobs.jobs, caller.user_id, cursor, limit)
    return JSONResponse(paginated("jobs", [job_json(services, job, base_url) for job in jobs], limit))


@router.get("/api/jobs/{job_id}")
async def read_job(job_id: str, caller: CurrentCaller, services: ServicesDep, base_url: BaseUrl) -> JSONResponse:
    job = await own_job(services, caller, job_id)
    return JSONResponse(job_json(services, job, base_url), headers=weights_header(job))


@router.post("/api/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, caller: CancellingCaller, services: ServicesDep, base_url: BaseUrl) -> JSONResponse:
    """A queued job is cancelled at once, a running one at its next step (202). A finished job stays as it is."""
    job = await own_job(services, caller, job_id)
    if not job.is_final:
        job = await services.dispatcher.cancel(job_id)
    status = 200 if job.is_final else 202
    return JSONResponse(job_json(services, job, base_url), status_code=status, headers=weights_header(job))


async def own_job(services: Services, caller: Caller, job_id: str) -> Job:
    """Raises NotFound, also for a job of another user."""
    try:
        job = await services.database.call(services.jobs.job, job_id)
    except KeyError:
        job = None
    if job is None or job.user_id != caller.user_id:
        raise NotFound(f"There is no job {job_id!r}.")
    return job
