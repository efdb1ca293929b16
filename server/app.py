"""The ASGI application: routes, middleware and the error handler."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
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
from server.api.errors import error_response
from server.api.middleware import BodyLimit, Cors, RequestId, ResponseHeaders
from server.errors import PlantainError
from server.services import Services

ROUTERS = (
    generation.router, jobs.router, models.router, account.router, files.router, health.router,
    admin_users.router, admin_keys.router, admin_jobs.router, admin_queue.router, admin_reports.router,
    auth_sessions.router, auth_users.router, auth_keys.router, auth_sessions.not_found_router,
)  # fmt: skip
"""In the order of matching: the catch-all of the sign-in routes comes last."""


def create_app(services: Services) -> FastAPI:
    """The application over `services`, which start and stop with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        yield
        await services.stop()

    app = FastAPI(
        title="Plantain",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # FastAPI's pages load their scripts from another host
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
