"""Which models there are, what they do and cost, and whether their weights are installed."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from pipelines.catalog import Model
from pipelines.params import Body, GenerateImage, GenerateVideo, RemoveBackgroundOf, UpscaleImage
from server.api.common import Authenticated, Served
from server.services import Services

router = APIRouter()

BODIES: dict[str, type[Body]] = {
    "image": GenerateImage,
    "video": GenerateVideo,
    "upscale": UpscaleImage,
    "remove-bg": RemoveBackgroundOf,
}


@router.get("/api/models")
async def list_models(_: Authenticated, served: Served) -> JSONResponse:
    models = [model_json(served, model) for model in served.shelf.catalog.models.values()]
    return JSONResponse({"models": models, "nextCursor": None})


@router.get("/api/models/{name}")
async def read_model(name: str, _: Authenticated, served: Served) -> JSONResponse:
    return JSONResponse(model_json(served, served.shelf.find(name)))


def model_json(served: Services, model: Model) -> dict[str, Any]:
    """`schema` is the JSON Schema of the body that the model's route takes."""
    retired = model.retired and {"date": model.retired.date, "successor": model.retired.successor}
    return {
        "id": model.id,
        "name": model.name,
        "kind": model.kind,
        "workflows": list(model.workflows),
        "credits": {"base": model.credits.base, "perSecond": model.credits.per_second},
        "runsOn": model.runs_on,
        "weights": served.shelf.installed.status(model),
        "licence": model.licence,
        "aliases": list(model.aliases),
        "schema": BODIES[model.kind].model_json_schema(),
        "retired": retired,
        "loras": [
            {"id": name, "installed": served.shelf.installed.status(lora) == "installed"}
            for name, lora in model.loras.items()
        ],
    }
