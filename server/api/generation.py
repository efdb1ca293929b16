"""The four generation routes of the hosted API.

`accept` and `wait` know nothing of the JSON that a request ends in, so that other wires can use them.
"""

import asyncio
import re
from dataclasses import dataclass
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

RETRY_AFTER_S = 2
"""How often a client should poll a job."""

router = APIRouter()


@router.post("/api/image/fal/generate", openapi_extra=schema_of(GenerateImage))
async def generate_image(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[GenerateImage, Depends(body_of(GenerateImage))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(GenerationCall(request, services, caller, "image", body, base_url))


@router.post("/api/image/fal/upscale", openapi_extra=schema_of(UpscaleImage))
async def upscale(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[UpscaleImage, Depends(body_of(UpscaleImage))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(GenerationCall(request, services, caller, "upscale", body, base_url))


@router.post("/api/image/fal/remove-bg", openapi_extra=schema_of(RemoveBackgroundOf))
async def remove_background(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[RemoveBackgroundOf, Depends(body_of(RemoveBackgroundOf))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(GenerationCall(request, services, caller, "remove-bg", body, base_url))


@router.post("/api/video/fal/generate", openapi_extra=schema_of(GenerateVideo))
async def generate_video(
    request: Request,
    caller: CurrentCaller,
    body: Annotated[GenerateVideo, Depends(body_of(GenerateVideo))],
    services: ServicesDep,
    base_url: BaseUrl,
) -> JSONResponse:
    return await run_generation(GenerationCall(request, services, caller, "video", body, base_url))


@dataclass(frozen=True)
class GenerationCall:
    """A call to a generation route. `base_url` is this server's address as the caller sees it."""

    request: Request
    services: Services
    caller: Caller
    kind: str
    body: Body
    base_url: str


async def run_generation(call: GenerationCall) -> JSONResponse:
    """Runs a request to the documented response: the output, or 202 and the job to `Prefer: respond-async`.

    Raises what `accept` raises, and the job's own failure.
    """
    accepted = await accept(call)
    respond_async, wait_s = preferences(call.request.headers.get("prefer", ""))
    job = await wait(call.services, accepted.job.id, wait_s if respond_async else None)
    balance = await refresh_balance(call.request, call.services, call.caller.user_id)
    if job is None:
        return _accepted(call, accepted)
    if job.status != "succeeded":
        raise _failure(job, balance)
    headers = _headers(accepted, balance) | {"X-Served-By": job.served_by or ""}
    return JSONResponse(output_json(call.services, job, call.base_url), headers=headers)


async def accept(call: GenerationCall) -> AcceptedJob:
    """The job of a request: a new one, or the one that its Idempotency-Key stands for, finished or not.

    Raises what the caller or the operator must fix, see `server.errors`.
    """
    request, own_base_urls = call.request, (call.base_url, str(call.request.base_url).rstrip("/"))
    claim = await _claim_of(request, call.body)
    wanted = GenerationRequest(call.caller, call.kind, call.body, own_base_urls, claim, request.headers.get("x-route"))
    try:
        accepted = await call.services.intake.accept(wanted)
    except ConcurrencyLimit:
        await refresh_balance(request, call.services, call.caller.user_id)
        raise
    if accepted.replayed:
        set_header(request, "Idempotent-Replayed", "true")
    return accepted


async def wait(services: Services, job_id: str, timeout_s: float | None) -> Job | None:
    """The finished job; None if it has not finished within `timeout_s` seconds."""
    try:
        async with asyncio.timeout(timeout_s):
            return await services.dispatcher.wait(job_id)
    except TimeoutError:
        return None


def preferences(prefer: str) -> tuple[bool, float]:
    """(respond-async, seconds of `wait`) of a Prefer header, RFC 7240."""
    tokens = [token.strip().lower() for token in re.split(r"[,;]", prefer)]
    waits = [token.removeprefix("wait=") for token in tokens if re.fullmatch(r"wait=\d{1,4}", token)]
    return "respond-async" in tokens, float(waits[0]) if waits else 0.0


async def _claim_of(request: Request, body: Body) -> IdempotencyClaim | None:
    """The Idempotency-Key of a request. A body with an image in it is large, so it is hashed off the event loop."""
    headers = request.headers.getlist("idempotency-key")
    key = idempotency.parse(headers) if headers else None
    if key is None:
        return None
    return IdempotencyClaim(request.url.path, key, await asyncio.to_thread(idempotency.hash_of, body))


def _accepted(call: GenerationCall, accepted: AcceptedJob) -> JSONResponse:
    headers = _headers(accepted, accepted.balance) | {
        "Location": f"/api/jobs/{accepted.job.id}",
        "Preference-Applied": "respond-async",
        "Retry-After": str(RETRY_AFTER_S),
    }
    return JSONResponse(job_json(call.services, accepted.job, call.base_url), status_code=202, headers=headers)


def _headers(accepted: AcceptedJob, balance: int) -> dict[str, str]:
    headers = {
        "X-Job-Id": accepted.job.id,
        "X-Credits-Charged": str(accepted.job.credits),
        "X-Credits-Remaining": str(balance),
        "Vary": "Prefer",
        **weights_header(accepted.job),
    }
    if accepted.ignored:
        headers["X-Ignored-Fields"] = ", ".join(sorted(map(_header_token, accepted.ignored)))
    return headers


def _header_token(field: str) -> str:
    """A field's name made safe for a header: the caller chose it."""
    return re.sub(r"[^\w.-]", "?", field, flags=re.ASCII)[:64]


def _failure(job: Job, balance: int) -> PlantainError:
    """The error of a job that failed or was cancelled."""
    error = job.error or {}
    cls = from_code(error.get("code", ""), JobWasCancelled if job.status == "cancelled" else GenerationFailed)
    headers = {"X-Job-Id": job.id, "X-Credits-Charged": "0", "X-Credits-Remaining": str(balance)}
    headers |= weights_header(job)
    extra = {name: value for name, value in error.items() if name not in ("error", "code")}
    extra |= {"refunded": job.credits, "balance": balance, "jobId": job.id}
    return cls(error.get("error", cls.title), headers=headers, **extra)
