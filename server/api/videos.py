"""The video route of the hosted API."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from pipelines.params import GenerateVideo
from server.api.common import Authenticated, BaseUrl, Served, body_of, schema_of
from server.api.generation import answer

router = APIRouter()


@router.post("/api/video/fal/generate", openapi_extra=schema_of(GenerateVideo))
async def generate(
    request: Request,
    caller: Authenticated,
    body: Annotated[GenerateVideo, Depends(body_of(GenerateVideo))],
    served: Served,
    base_url: BaseUrl,
) -> JSONResponse:
    return await answer(request, served, caller, "video", body, base_url)
