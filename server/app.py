"""The ASGI application: routes, the request id and body limit around them, and the one error envelope."""

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.api import account, files, generation, health, jobs, models
from server.api.admin import jobs as admin_jobs
from server.api.admin import keys as admin_keys
from server.api.admin import queue as admin_queue
from server.api.admin import reports as admin_reports
from server.api.admin import users as admin_users
from server.api.auth import keys as auth_keys
from server.api.auth import sessions as auth_sessions
from server.api.auth import users as auth_users
from server.api.middleware import BodyLimit, Cors, RequestId, ResponseHeaders
from server.db.database import database_error_response
from server.errors import BadRequest, InternalError, InvalidBody, MethodNotAllowed, NotFound, PlantainError
from server.services import Services

log = logging.getLogger("plantain.http")

ROUTERS = (
    generation.router, jobs.router, models.router, account.router, files.router, health.router,
    admin_users.router, admin_keys.router, admin_jobs.router, admin_queue.router, admin_reports.router,
    auth_sessions.router, auth_users.router, auth_keys.router, auth_sessions.not_found_router,
)  # fmt: skip
"""The catch-all of the sign-in routes comes last."""


def create_app(services: Services) -> FastAPI:
    """Serves `services`; starts and stops them with itself."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        yield
        await services.stop()

    app = FastAPI(
        title="Plantain",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # FastAPI's pages fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(BodyLimit)
    app.add_middleware(ResponseHeaders)
    if services.settings.trusted_origins:
        app.add_middleware(Cors, trusted=services.settings.trusted_origins)
    app.add_middleware(RequestId)
    app.add_exception_handler(PlantainError, error_response)
    app.add_exception_handler(RequestValidationError, error_response)
    app.add_exception_handler(HTTPException, error_response)
    app.add_exception_handler(Exception, error_response)
    return app


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Turn whatever was raised into the envelope. What is not of our tree is logged, and its text kept here."""
    told = to_plantain_error(request, error)
    request_id = request.scope["request_id"]
    body = told.body(request_id)
    problem = "application/problem+json" in request.headers.get("accept", "")
    media_type = "application/problem+json" if problem else "application/json"
    headers = {**told.headers, "X-Request-Id": request_id}  # RequestId does not see what nobody expected
    return JSONResponse(body, told.status, headers, media_type)


def to_plantain_error(request: Request, error: Exception) -> PlantainError:
    match error:
        case PlantainError():
            return error
        case sqlite3.DatabaseError():
            log.error("request %s: the database: %s", request.scope["request_id"], error)
            return database_error_response(error)
        case RequestValidationError():
            issues = [{"path": str(each["loc"][-1]), "message": each["msg"]} for each in error.errors()]
            text = "; ".join(f"{issue['path']}: {issue['message']}" for issue in issues)
            return InvalidBody(text, issues=issues)
        case HTTPException(status_code=404):
            return NotFound(f"There is nothing at {request.url.path}.")
        case HTTPException(status_code=405):
            return MethodNotAllowed(
                f"{request.url.path} does not take {request.method}.", headers=dict(error.headers or {})
            )
        case HTTPException(status_code=status) if status < 500:
            return BadRequest(str(error.detail))
        case _:
            log.error("request %s", request.scope["request_id"], exc_info=error)
            return InternalError("Something went wrong here; the server's log says what.")
