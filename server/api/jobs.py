"""Jobs: list, look, cancel; and how a job or its outcome is told over HTTP."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from server.accounts import Caller
from server.api.common import Authenticated, BaseUrl, Served, Stopper
from server.clock import iso, iso_or_none
from server.errors import NotFound
from server.jobs import Job
from server.services import Services

router = APIRouter()

FILES = frozenset({"image", "images", "video", "audio"})
NO_SEED = 0
"""The answer's seed where the model at fal takes none and tells none."""


@router.get("/api/jobs")
async def list_jobs(
    caller: Authenticated,
    served: Served,
    base_url: BaseUrl,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JSONResponse:
    """The caller's jobs, newest first."""
    jobs = await served.store.call(served.store.jobs, caller.user_id, cursor, limit)
    next_cursor = jobs[-1].id if len(jobs) == limit else None
    return JSONResponse({"jobs": [job_json(served, job, base_url) for job in jobs], "nextCursor": next_cursor})


@router.get("/api/jobs/{job_id}")
async def read_job(job_id: str, caller: Authenticated, served: Served, base_url: BaseUrl) -> JSONResponse:
    job = await own_job(served, caller, job_id)
    return JSONResponse(job_json(served, job, base_url), headers=weights_header(job))


@router.post("/api/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, caller: Stopper, served: Served, base_url: BaseUrl) -> JSONResponse:
    """Queued: cancelled at once. Running: at its next step, so the answer is 202. Ended: as it is."""
    job = await own_job(served, caller, job_id)
    if not job.is_final:
        job = await served.dispatcher.cancel(job_id)
    status = 200 if job.is_final else 202
    return JSONResponse(job_json(served, job, base_url), status_code=status, headers=weights_header(job))


async def own_job(served: Services, caller: Caller, job_id: str) -> Job:
    """Somebody else's job is not found."""
    try:
        job = await served.store.call(served.store.job, job_id)
    except KeyError:
        job = None
    if job is None or job.user_id != caller.user_id:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def weights_header(job: Job) -> dict[str, str]:
    """Demo weights are never used in silence."""
    return {"X-Weights": job.weights} if job.weights == "demo" else {}


def job_json(served: Services, job: Job, base_url: str) -> dict[str, Any]:
    """The job as callers see it; parts that do not apply are null."""
    return {
        "id": job.id,
        "kind": job.kind,
        "model": job.model,
        "workflow": job.workflow,
        "status": job.status,
        "progress": _progress(served, job),
        "queue": _queue(served, job),
        "servedBy": job.served_by,
        "weights": job.weights,
        "device": job.device,
        "credits": job.credits,
        "createdAt": iso(job.created_at),
        "startedAt": iso_or_none(job.started_at),
        "finishedAt": iso_or_none(job.finished_at),
        "params": _params(served, job.params, base_url),
        "output": output_json(served, job, base_url) if job.status == "succeeded" else None,
        "error": job.error,
    }


def output_json(served: Services, job: Job, base_url: str) -> dict[str, Any]:
    """The documented answer of the job's route: these keys and no others."""
    output = job.output or {}
    url = output.get("url") or served.files.url(job.output_name, base_url)
    match job.kind:
        case "image":
            return {"imageUrl": url, "seed": output.get("seed", job.params.get("seed", NO_SEED))}
        case "upscale":
            return {"imageUrl": url, "width": output["width"], "height": output["height"]}
        case "video":
            return {"videoUrl": url, "duration": output["duration"]}
        case _:
            return {"imageUrl": url}


def _progress(served: Services, job: Job) -> dict[str, Any] | None:
    progress = served.dispatcher.progress.get(job.id)
    if job.status != "running" or progress is None:
        return None
    left = served.dispatcher.seconds_left(job.id)
    return {
        "phase": progress.phase,
        "step": progress.step,
        "steps": progress.steps,
        "secondsLeft": left and round(left, 1),
    }


def _queue(served: Services, job: Job) -> dict[str, Any] | None:
    place = served.dispatcher.place(job.id) if job.status == "queued" else None
    if place is None:
        return None
    return {
        "position": place.position,
        "reason": served.dispatcher.reason(job.id),
        "expectedStartAt": iso_or_none(place.start_at),
    }


def _params(served: Services, params: Mapping[str, Any], base_url: str) -> dict[str, Any]:
    """With the input files as URLs under the names that callers send them by."""
    shown = {name: value for name, value in params.items() if name not in FILES}
    shown |= {f"{name}Url": served.files.url(params[name], base_url) for name in ("video", "audio") if params.get(name)}
    names = [params["image"]] if "image" in params else params.get("images", [])
    urls = [served.files.url(name, base_url) for name in names]
    if len(urls) == 1:
        shown["imageUrl"] = urls[0]
    elif urls:
        shown["imageUrls"] = urls
    return shown
