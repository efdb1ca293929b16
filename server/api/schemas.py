"""Responses as JSON or CSV: jobs, outputs, ledger entries, usage, pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response

from server.accounts import usage
from server.accounts.usage import Period, Usage
from server.jobs.job import Job
from server.services import Services
from server.timestamps import iso, iso_or_none

FILES = frozenset({"image", "images", "video", "audio"})
NO_SEED = 0
"""The seed of an output if the model at fal takes none and reports none."""


def weights_header(job: Job) -> dict[str, str]:
    """Reports that a job ran on demo weights."""
    return {"X-Weights": job.weights} if job.weights == "demo" else {}


def job_json(services: Services, job: Job, base_url: str) -> dict[str, Any]:
    """The job as callers see it. Parts that do not apply are null."""
    return {
        "id": job.id,
        "kind": job.kind,
        "model": job.model,
        "workflow": job.workflow,
        "status": job.status,
        "progress": _progress(services, job),
        "queue": _queue(services, job),
        "servedBy": job.served_by,
        "weights": job.weights,
        "device": job.device,
        "credits": job.credits,
        "createdAt": iso(job.created_at),
        "startedAt": iso_or_none(job.started_at),
        "finishedAt": iso_or_none(job.finished_at),
        "params": _params(services, job.params, base_url),
        "output": output_json(services, job, base_url) if job.status == "succeeded" else None,
        "error": job.error,
    }


def output_json(services: Services, job: Job, base_url: str) -> dict[str, Any]:
    """The documented response of the job's route: these keys and no others."""
    output = job.output or {}
    url = output.get("url") or services.files.url(job.output_name, base_url)
    match job.kind:
        case "image":
            return {"imageUrl": url, "seed": output.get("seed", job.params.get("seed", NO_SEED))}
        case "upscale":
            return {"imageUrl": url, "width": output["width"], "height": output["height"]}
        case "video":
            return {"videoUrl": url, "duration": output["duration"]}
        case _:
            return {"imageUrl": url}


def _progress(services: Services, job: Job) -> dict[str, Any] | None:
    progress = services.dispatcher.status.progress.get(job.id)
    if job.status != "running" or progress is None:
        return None
    left = services.dispatcher.status.seconds_left(job.id)
    return {
        "phase": progress.phase,
        "step": progress.step,
        "steps": progress.steps,
        "secondsLeft": left and round(left, 1),
    }


def _queue(services: Services, job: Job) -> dict[str, Any] | None:
    place = services.dispatcher.status.place(job.id) if job.status == "queued" else None
    if place is None:
        return None
    return {
        "position": place.position,
        "reason": services.dispatcher.status.reason(job.id),
        "expectedStartAt": iso_or_none(place.start_at),
    }


def _params(services: Services, params: Mapping[str, Any], base_url: str) -> dict[str, Any]:
    """The params, with input files as URLs under the names that callers send."""
    shown = {name: value for name, value in params.items() if name not in FILES}
    shown |= {
        f"{name}Url": services.files.url(params[name], base_url) for name in ("video", "audio") if params.get(name)
    }
    names = [params["image"]] if "image" in params else params.get("images", [])
    urls = [services.files.url(name, base_url) for name in names]
    if len(urls) == 1:
        shown["imageUrl"] = urls[0]
    elif urls:
        shown["imageUrls"] = urls
    return shown


def usage_response(lines: Sequence[Usage], period: Period, form: str) -> Response:
    if form == "csv":
        name = f"usage-{period.first}-{period.last}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(usage.as_csv(lines), media_type="text/csv", headers=headers)
    return JSONResponse(
        {
            "usage": usage.as_json(lines),
            "totals": usage.totals(lines),
            "from": str(period.first),
            "to": str(period.last),
            "nextCursor": None,
        }
    )


def paginated(name: str, items: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """One page of a list: the items under `name`, and as cursor the id of the last one if there may be more."""
    return {name: items, "nextCursor": items[-1]["id"] if len(items) == limit else None}


def entries_json(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    return paginated("entries", [_entry(row) for row in rows], limit)


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "kind": row["kind"],
        "amount": row["amount"],
        "balance": row["balance"],
        "jobId": row["job_id"],
        "note": row["note"],
        "createdAt": iso(row["created_at"]),
    }
