"""How the four generation routes answer: wait for the job, or `202` to `Prefer: respond-async`."""

import asyncio
import re

from fastapi import Request
from fastapi.responses import JSONResponse

from pipelines.params import Body
from server.accounts import Caller
from server.api.entrance import read_books
from server.api.jobs import job_json, output_json, weights_header
from server.api.once import accept_once
from server.errors import ConcurrencyLimit, GenerationFailed, JobWasCancelled, PlantainError, from_code
from server.intake import Accepted
from server.jobs import Job
from server.services import Services

RETRY_AFTER_S = 2


async def answer(
    request: Request, served: Services, caller: Caller, kind: str, body: Body, base_url: str
) -> JSONResponse:
    """Run one request to its documented answer. What it raises becomes the error envelope."""
    own_bases = (base_url, str(request.base_url).rstrip("/"))
    try:
        accepted = await accept_once(request, served, caller, kind, body, own_bases)
    except ConcurrencyLimit:
        await read_books(request, served, caller.user_id)
        raise
    respond_async, wait_s = preferences(request.headers.get("prefer", ""))
    try:
        async with asyncio.timeout(wait_s if respond_async else None):
            job = await served.dispatcher.wait(accepted.job.id)
    except TimeoutError:
        await read_books(request, served, caller.user_id)
        return _accepted(served, accepted, base_url)
    balance = await read_books(request, served, caller.user_id)
    if job.status != "succeeded":
        raise _failure(job, balance)
    headers = _headers(accepted, balance) | {"X-Served-By": job.served_by or ""}
    return JSONResponse(output_json(served, job, base_url), headers=headers)


def preferences(prefer: str) -> tuple[bool, float]:
    """(respond-async, seconds of `wait`) of a Prefer header, RFC 7240."""
    tokens = [token.strip().lower() for token in re.split(r"[,;]", prefer)]
    waits = [token.removeprefix("wait=") for token in tokens if re.fullmatch(r"wait=\d{1,4}", token)]
    return "respond-async" in tokens, float(waits[0]) if waits else 0.0


def _accepted(served: Services, accepted: Accepted, base_url: str) -> JSONResponse:
    location = f"/api/jobs/{accepted.job.id}"
    headers = _headers(accepted, accepted.balance) | {
        "Location": location,
        "Preference-Applied": "respond-async",
        "Retry-After": str(RETRY_AFTER_S),
    }
    return JSONResponse(job_json(served, accepted.job, base_url), status_code=202, headers=headers)


def _headers(accepted: Accepted, balance: int) -> dict[str, str]:
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
