"""Routes of stored files: download by an unguessable name, upload."""

import time
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.dependencies import BaseUrl, CurrentCaller, ServicesDep
from server.files.inputs import ClipKind
from server.services import Services

router = APIRouter()


@router.head("/files/{name}", include_in_schema=False)
@router.get("/files/{name}")
async def read_file(name: str, services: ServicesDep) -> Response:
    """Needs no key: the name is the credential, as in the hosted service's links."""
    return services.files.response(name)


@router.post("/api/uploads")
async def upload(request: Request, caller: CurrentCaller, services: ServicesDep, base_url: BaseUrl) -> JSONResponse:
    """Takes an image as a form's `file` or as the body; video or audio as the body, with its content type.

    Returns the URL to send as `imageUrl`, `videoUrl` or `audioUrl`, and the size or duration.
    """
    kind = request.headers.get("content-type", "").partition("/")[0].lower()
    name, facts = await (_clip(services, kind, request) if kind in ("video", "audio") else _image(services, request))
    await services.database.call(services.jobs.add_upload, name, caller.user_id, time.time())
    return JSONResponse({"url": services.files.url(name, base_url), **facts}, status_code=201)


async def _image(services: Services, request: Request) -> tuple[str, dict[str, Any]]:
    stored = await services.media.upload(request)
    return stored.name, {"width": stored.width, "height": stored.height}


async def _clip(services: Services, kind: str, request: Request) -> tuple[str, dict[str, Any]]:
    stored = await services.intake.clips.upload(cast(ClipKind, kind), request)
    return stored.name, {"duration": round(stored.duration_s, 3)}
