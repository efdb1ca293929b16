"""Routes of the model list: workflows, prices, body schemas, and whether weights are installed."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from pipelines.catalog.catalog import Model
from pipelines.params import Body, GenerateImage, GenerateVideo, RemoveBackgroundOf, UpscaleImage
from server.api.dependencies import CurrentCaller, ServicesDep
from server.services import Services

router = APIRouter()

BODIES: dict[str, type[Body]] = {
    "image": GenerateImage,
    "video": GenerateVideo,
    "upscale": UpscaleImage,
    "remove-bg": RemoveBackgroundOf,
}


@router.get("/api/models")
async def list_models(_: CurrentCaller, services: ServicesDep) -> JSONResponse:
    models = [model_json(services, model) for model in services.registry.catalog.models.values()]
    return JSONResponse({"models": models, "nextCursor": None})


@router.get("/api/models/{name}")
async def read_model(name: str, _: CurrentCaller, services: ServicesDep) -> JSONResponse:
    return JSONResponse(model_json(services, services.registry.find(name)))


def model_json(services: Services, model: Model) -> dict[str, Any]:
    """`schema` is the JSON Schema of the body of the model's route."""
    retired = model.retired and {"date": model.retired.date, "successor": model.retired.successor}
    return {
        "id": model.id,
        "name": model.name,
        "kind": model.kind,
        "workflows": list(model.workflows),
        "credits": {"base": model.credits.base, "perSecond": model.credits.per_second},
        "runsOn": model.runs_on,
        "weights": services.registry.installed.status(model),
        "licence": model.licence,
        "aliases": list(model.aliases),
        "schema": BODIES[model.kind].model_json_schema(),
        "retired": retired,
        "loras": [
            {"id": name, "installed": services.registry.installed.status(lora) == "installed"}
            for name, lora in model.loras.items()
        ],
    }
