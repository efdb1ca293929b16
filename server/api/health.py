"""Liveness and readiness probes."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.dependencies import ServicesDep

router = APIRouter()


@router.get("/healthz")
async def healthz() -> JSONResponse:
    """200 as long as the process responds."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(services: ServicesDep) -> JSONResponse:
    """200 if a worker can run jobs and the database can be written, else 503 with the reason in `trouble`."""
    dispatcher = services.dispatcher
    workers = {device: worker.status for device, worker in dispatcher.status.workers.items()}
    body = {
        "status": "ready" if dispatcher.ready else "not ready",
        "workers": workers,
        "trouble": dispatcher.unhealthy_reason,
    }
    return JSONResponse(body, status_code=200 if dispatcher.ready else 503)
