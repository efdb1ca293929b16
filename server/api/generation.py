"""The four generation routes of the hosted API.

A call waits for its job, or answers 202 to `Prefer: respond-async`. An Idempotency-Key with the same body is one job.
"""

import asyncio
import re
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from pipelines.params import Body, GenerateImage, GenerateVideo, RemoveBackgroundOf, UpscaleImage
from server.accounts.users import Caller
from server.api.dependencies import BaseUrl, CurrentCaller, ServicesDep, body_of, refresh_balance, schema_of
from server.api.middleware import set_header
from server.api.schemas import job_json, output_json, weights_header
from server.errors import ConcurrencyLimit, GenerationFailed, JobWasCancelled, PlantainError, from_code
from server.intake.intake import AcceptedJob, GenerationRequest
from server.jobs import idempotency
from server.jobs.job import IdempotencyClaim, Job
from server.services import Services

router = APIRouter()


async def accept(
    request: Request, services: Services, caller: Caller, kind: str, body: Body, base_url: str
) -> AcceptedJob:
    """Accept one generation request; the job is charged and queued, or replayed by its Idempotency-Key."""
    own_base_urls = (base_url, str(request.base_url).rstrip("/"))
    claim = await _claim_of(request, body)
    wanted = GenerationRequest(caller, kind, body, own_base_urls, claim, request.headers.get("x-route"))
    return await services.intake.accept(wanted)


async def _claim_of(request: Request, body: Body) -> IdempotencyClaim | None:
    """Hashing a body with a picture in it takes long: it runs off the event loop."""
    key = idempotency.parse(request.headers.getlist("idempotency-key"))
    if key is None:
        return None
    return IdempotencyClaim(request.url.path, key, await asyncio.to_thread(idempotency.hash_of, body))


RETRY_AFTER_S = 2


async def run_generation(
    request: Request, services: Services, caller: Caller, kind: str, body: Body, base_url: str
) -> JSONResponse:
    """Run one request to its documented answer. What it raises becomes the error envelope."""
    try:
        accepted = await accept(request, services, caller, kind, body, base_url)
    except ConcurrencyLimit:
        await refresh_balance(request, services, caller.user_id)
        raise
    if accepted.replayed:
        set_header(request, "Idempotent-Replayed", "true")
    respond_async, wait_s = preferences(request.headers.get("prefer", ""))
    try:
        async with asyncio.timeout(wait_s if respond_async else None):
            job = await services.dispatcher.wait(accepted.job.id)
    except TimeoutError:
        await refresh_balance(request, services, caller.user_id)
        return _accepted(services, accepted, base_url)
    balance = await refresh_balance(request, services, caller.user_id)
    if job.status != "succeeded":
        raise _failure(job, balance)
    headers = _headers(accepted, balance) | {"X-Served-By": job.served_by or ""}
    return JSONResponse(output_json(services, job, base_url), headers=headers)


def preferences(prefer: str) -> tuple[bool, float]:
    """(respond-async, seconds of `wait`) of a Prefer header, RFC 7240."""
    tokens = [token.strip().lower() for token in re.split(r"[,;]", prefer)]
    waits = [token.removeprefix("wait=") for token in tokens if re.fullmatch(r"wait=\d{1,4}", token)]
    return "respond-async" in tokens, float(waits[0]) if waits else 0.0


def _accepted(services: Services, accepted: AcceptedJob, base_url: str) -> JSONResponse:
    location = f"/api/jobs/{accepted.job.id}"
    headers = _headers(accepted, accepted.balance) | {
        "Location": location,
        "Preference-Applied": "respond-async",
        "Retry-After": str(RETRY_AFTER_S),
    }
    return JSONResponse(job_json(services, accepted.job, base_url), status_code=202, headers=headers)


def _headers(accepted: AcceptedJob, balance: int) -> dict[str, str]:
    headers = {
        "X-Job-Id": accepted.job.id,
        "X-Credits-Charged": str(accepted.job.credits),
        "X-Credits-Remaining": str(balance),
        "Vary": "Prefer",
        **weights_header(accepted.job),
    }
    if accepted.ignored:
        headers["X-Ignored-Fields"] = ", ".join(sorted(map(_token, accepted.ignored)))
    return headers


def _token(field: str) -> str:
    """A field's name fit for a header: it came from the caller."""
    return re.sub(r"[^\w.-]", "?", field, flags=re.ASCII)[:64]


def _failure(job: Job, balance: int) -> PlantainError:
    error = job.error or {}
    cls = from_code(error.get("code", ""), JobWasCancelled if job.status == "cancelled" else GenerationFailed)
    headers = {"X-Job-Id": job.id, "X-Credits-Charged": "0", "X-Credits-Remaining": str(balance)}
    headers |= weights_header(job)
    extra = {name: value for name, value in error.items() if name not in ("error", "code")}
    extra |= {"refunded": job.credits, "balance": balance, "jobId": job.id}
    return cls(error.get("error", cls.title), headers=headers, **extra)


@router.post("/api/image/fal/generate", openapi_extra=schema_of(GenerateImage))
async def generate_image(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[GenerateImage, Depends(body_of(GenerateImage))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(request, services, caller, "image", body, base_url)


@router.post("/api/image/fal/upscale", openapi_extra=schema_of(UpscaleImage))
async def upscale(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[UpscaleImage, Depends(body_of(UpscaleImage))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(request, services, caller, "upscale", body, base_url)


@router.post("/api/image/fal/remove-bg", openapi_extra=schema_of(RemoveBackgroundOf))
async def remove_background(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[RemoveBackgroundOf, Depends(body_of(RemoveBackgroundOf))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(request, services, caller, "remove-bg", body, base_url)


@router.post("/api/video/fal/generate", openapi_extra=schema_of(GenerateVideo))
async def generate_video(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[GenerateVideo, Depends(body_of(GenerateVideo))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(request, services, caller, "video", body, base_url)
