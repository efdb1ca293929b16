"""The ASGI application: routes, the request id and body limit around them, and the one error envelope."""

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.api import (
    account,
    admin,
    admin_books,
    admin_keys,
    auth,
    auth_keys,
    auth_user,
    devices,
    files,
    health,
    images,
    jobs,
    models,
    queue,
    videos,
)
from server.cors import Cors
from server.envelope import BodyLimit, LateHeaders, RequestId
from server.errors import BadRequest, InternalError, InvalidBody, MethodNotAllowed, NotFound, PlantainError
from server.opening import as_told
from server.services import Services

log = logging.getLogger("plantain.http")


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
    for routes in (images, videos, jobs, models, account, files, health, devices):
        app.include_router(routes.router)
    for admin_routes in (admin, admin_keys, admin_books, queue):
        app.include_router(admin_routes.router)
    for auth_routes in (auth.router, auth_user.router, auth_keys.router, auth.nowhere):
        app.include_router(auth_routes)
    app.add_middleware(BodyLimit)
    app.add_middleware(LateHeaders)
    if services.settings.trusted_origins:
        app.add_middleware(Cors, trusted=services.settings.trusted_origins)
    app.add_middleware(RequestId)
    app.add_exception_handler(PlantainError, _tell)
    app.add_exception_handler(RequestValidationError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(Exception, _tell)
    return app


async def _tell(request: Request, error: Exception) -> JSONResponse:
    """Turn whatever was raised into the envelope. What is not of our tree is logged, and its text kept here."""
    told = _of_our_tree(request, error)
    request_id = request.scope["request_id"]
    body = told.body(request_id)
    problem = "application/problem+json" in request.headers.get("accept", "")
    media_type = "application/problem+json" if problem else "application/json"
    headers = {**told.headers, "X-Request-Id": request_id}  # RequestId does not see what nobody expected
    return JSONResponse(body, told.status, headers, media_type)


def _of_our_tree(request: Request, error: Exception) -> PlantainError:
    match error:
        case PlantainError():
            return error
        case sqlite3.DatabaseError():
            log.error("request %s: the database: %s", request.scope["request_id"], error)
            return as_told(error)
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
