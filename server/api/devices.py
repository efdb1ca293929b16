"""What each device has: its budget, the components on it and in host memory, what it runs, what had to go or failed."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.common import Admin, Served
from server.memory import with_models

router = APIRouter()


@router.get("/api/admin/devices")
async def list_devices(_: Admin, served: Served) -> JSONResponse:
    dispatcher, models = served.dispatcher, served.shelf.users()
    devices: list[dict[str, Any]] = []
    for worker in dispatcher.workers.values():
        rungs = await served.store.call(dispatcher.memory.rungs, worker.id)
        devices.append({**with_models(dispatcher.state(worker), models), "rungs": rungs})
    return JSONResponse({"devices": devices})
