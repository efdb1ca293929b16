"""Routes of stored files: download by an unguessable name, upload."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.dependencies import BaseUrl, CurrentCaller, ServicesDep
from server.files.inputs import AUDIO, IMAGE, VIDEO
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
    name, facts = await _store(services, request)
    await services.database.call(services.jobs.add_upload, name, caller.user_id, time.time())
    return JSONResponse({"url": services.files.url(name, base_url), **facts}, status_code=201)


async def _store(services: Services, request: Request) -> tuple[str, dict[str, Any]]:
    match request.headers.get("content-type", "").partition("/")[0].lower():
        case "video":
            video = await services.inputs.from_upload(VIDEO, request)
            return video.name, {"duration": round(video.info.duration_s, 3)}
        case "audio":
            audio = await services.inputs.from_upload(AUDIO, request)
            return audio.name, {"duration": round(audio.info.duration_s, 3)}
    image = await services.inputs.from_upload(IMAGE, request)
    return image.name, {"width": image.info.width, "height": image.info.height}
