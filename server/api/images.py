"""The three image routes of the hosted API."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from pipelines.params import GenerateImage, RemoveBackgroundOf, UpscaleImage
from server.api.common import Authenticated, BaseUrl, Served, body_of, schema_of
from server.api.generation import answer

router = APIRouter()


@router.post("/api/image/fal/generate", openapi_extra=schema_of(GenerateImage))
async def generate(
    request: Request,
    caller: Authenticated,
    body: Annotated[GenerateImage, Depends(body_of(GenerateImage))],
    served: Served,
    base_url: BaseUrl,
) -> JSONResponse:
    return await answer(request, served, caller, "image", body, base_url)


@router.post("/api/image/fal/upscale", openapi_extra=schema_of(UpscaleImage))
async def upscale(
    request: Request,
    caller: Authenticated,
    body: Annotated[UpscaleImage, Depends(body_of(UpscaleImage))],
    served: Served,
    base_url: BaseUrl,
) -> JSONResponse:
    return await answer(request, served, caller, "upscale", body, base_url)


@router.post("/api/image/fal/remove-bg", openapi_extra=schema_of(RemoveBackgroundOf))
async def remove_background(
    request: Request,
    caller: Authenticated,
    body: Annotated[RemoveBackgroundOf, Depends(body_of(RemoveBackgroundOf))],
    served: Served,
    base_url: BaseUrl,
) -> JSONResponse:
    return await answer(request, served, caller, "remove-bg", body, base_url)
