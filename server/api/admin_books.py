"""Running the server, part three: everyone's jobs and usage, the plans, and what admins did."""

import json
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server import audit, usage
from server.acts import Acting
from server.api.account import Limit
from server.api.admin import act
from server.api.common import Admin, BaseUrl, Served
from server.api.jobs import job_json
from server.api.usage import Asked, Form, answer
from server.clock import iso
from server.errors import NotFound
from server.jobs import Job
from server.services import Services
from server.usage import camel

router = APIRouter(prefix="/api/admin")


@router.get("/jobs")
async def list_jobs(
    _: Admin,
    served: Served,
    base_url: BaseUrl,
    cursor: str | None = None,
    limit: Limit = 50,
    user: str | None = None,
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] | None = None,
) -> JSONResponse:
    """Everyone's, the newest first."""
    jobs = await served.store.call(served.store.jobs, user, cursor, limit, status)
    next_cursor = jobs[-1].id if len(jobs) == limit else None
    return JSONResponse({"jobs": [_job_json(served, job, base_url) for job in jobs], "nextCursor": next_cursor})


@router.get("/jobs/{job_id}")
async def read_job(job_id: str, _: Admin, served: Served, base_url: BaseUrl) -> JSONResponse:
    return JSONResponse(_job_json(served, await _job(served, job_id), base_url))


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, caller: Admin, served: Served, base_url: BaseUrl) -> JSONResponse:
    """As its owner's cancel does, and the credits go back to the owner."""
    job = await _job(served, job_id)
    if not job.is_final:
        await act(served, caller, Acting.note, "jobs.cancel", job_id, user=job.user_id)
        job = await served.dispatcher.cancel(job_id)
    return JSONResponse(_job_json(served, job, base_url), status_code=200 if job.is_final else 202)


@router.get("/usage")
async def read_usage(_: Admin, served: Served, period: Asked, form: Form = "json", user: str | None = None) -> Response:
    lines = await served.store.call(usage.read, served.store.db, user, period, served.fal_prices)
    return answer(lines, period, form)


@router.get("/plans")
async def list_plans(_: Admin, served: Served) -> JSONResponse:
    """To change them is to write `plans.toml` in the data folder."""
    return JSONResponse({"plans": [camel(asdict(plan)) for plan in served.plans.values()], "nextCursor": None})


@router.get("/audit")
async def list_acts(_: Admin, served: Served, cursor: int | None = None, limit: Limit = 50) -> JSONResponse:
    rows = await served.store.call(audit.entries, served.store.db, cursor, limit)
    next_cursor = rows[-1]["id"] if len(rows) == limit else None
    return JSONResponse({"acts": [_act_json(row) for row in rows], "nextCursor": next_cursor})


def _job_json(served: Services, job: Job, base_url: str) -> dict[str, Any]:
    return {**job_json(served, job, base_url), "userId": job.user_id, "keyId": job.key_id}


def _act_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "actor": row["actor"],
        "actorId": row["actor_id"],
        "actorKeyId": row["actor_key_id"],
        "act": row["act"],
        "subject": row["subject"],
        "detail": json.loads(row["detail"]),
        "createdAt": iso(row["created_at"]),
    }


async def _job(served: Services, job_id: str) -> Job:
    try:
        return await served.store.call(served.store.job, job_id)
    except KeyError:
        raise NotFound(f"There is no job {job_id!r}.") from None
