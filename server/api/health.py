"""Whether the server lives, and whether it can serve."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.dependencies import ServicesDep

router = APIRouter()


@router.get("/healthz")
async def healthz() -> JSONResponse:
    """The process answers: that is all this says."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(services: ServicesDep) -> JSONResponse:
    """200 once a worker can serve and the database can be written; 503 with what is wrong otherwise."""
    dispatcher = services.dispatcher
    workers = {device: worker.status for device, worker in dispatcher.status.workers.items()}
    body = {
        "status": "ready" if dispatcher.ready else "not ready",
        "workers": workers,
        "trouble": dispatcher.unhealthy_reason,
    }
    return JSONResponse(body, status_code=200 if dispatcher.ready else 503)
