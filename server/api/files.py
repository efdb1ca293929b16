"""Files by their unguessable names, and uploads."""

import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.common import Authenticated, BaseUrl, Served

router = APIRouter()


@router.head("/files/{name}", include_in_schema=False)
@router.get("/files/{name}")
async def read_file(name: str, served: Served) -> Response:
    """Needs no key: whoever knows the name may read it, as with the hosted service's links."""
    return served.files.response(name)


@router.post("/api/uploads")
async def upload(request: Request, caller: Authenticated, served: Served, base_url: BaseUrl) -> JSONResponse:
    """An image as a form's `file` or as the bare body; answers the URL to use as `imageUrl`."""
    stored = await served.media.upload(request)
    await served.store.call(served.store.add_upload, stored.name, caller.user_id, time.time())
    answer = {"url": served.files.url(stored.name, base_url), "width": stored.width, "height": stored.height}
    return JSONResponse(answer, status_code=201)
