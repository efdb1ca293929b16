"""Files by their unguessable names, and uploads."""

import time
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.common import Authenticated, BaseUrl, Served
from server.clips import ClipKind
from server.services import Services

router = APIRouter()


@router.head("/files/{name}", include_in_schema=False)
@router.get("/files/{name}")
async def read_file(name: str, served: Served) -> Response:
    """Needs no key: whoever knows the name may read it, as with the hosted service's links."""
    return served.files.response(name)


@router.post("/api/uploads")
async def upload(request: Request, caller: Authenticated, served: Served, base_url: BaseUrl) -> JSONResponse:
    """An image as a form's `file` or as the bare body; a video or audio as the bare body, with its content type.

    Answers the URL to use as `imageUrl`, `videoUrl` or `audioUrl`, and what is known of the file.
    """
    kind = request.headers.get("content-type", "").partition("/")[0].lower()
    name, facts = await (_clip(served, kind, request) if kind in ("video", "audio") else _image(served, request))
    await served.store.call(served.store.add_upload, name, caller.user_id, time.time())
    return JSONResponse({"url": served.files.url(name, base_url), **facts}, status_code=201)


async def _image(served: Services, request: Request) -> tuple[str, dict[str, Any]]:
    stored = await served.media.upload(request)
    return stored.name, {"width": stored.width, "height": stored.height}


async def _clip(served: Services, kind: str, request: Request) -> tuple[str, dict[str, Any]]:
    stored = await served.intake.clips.upload(cast(ClipKind, kind), request)
    return stored.name, {"duration": round(stored.duration_s, 3)}
