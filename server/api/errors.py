"""Error responses: every exception becomes JSON in the envelope of the surface that was called."""

import logging
import sqlite3
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.api.auth.dependencies import PREFIX as AUTH_PREFIX
from server.auth.errors import AuthError
from server.db.database import database_error_response
from server.errors import BadRequest, InternalError, InvalidBody, MethodNotAllowed, NotFound, PlantainError

log = logging.getLogger("plantain.http")

PROBLEM_JSON = "application/problem+json"
Envelope = Callable[[PlantainError, str], dict[str, Any]]
"""The body for an error; the text is the request id."""


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """The handler of all exceptions. Unexpected ones are logged, and their text is not sent."""
    plantain_error = to_plantain_error(request, error)
    request_id = request.scope["request_id"]
    body = envelope_for(request.url.path)(plantain_error, request_id)
    media_type = PROBLEM_JSON if PROBLEM_JSON in request.headers.get("accept", "") else "application/json"
    headers = {**plantain_error.headers, "X-Request-Id": request_id}  # the middleware does not see unexpected errors
    return JSONResponse(body, plantain_error.status, headers, media_type)


def envelope_for(path: str) -> Envelope:
    """The error envelope of the surface that a path belongs to. A new wire protocol adds its own here."""
    if path == AUTH_PREFIX or path.startswith(f"{AUTH_PREFIX}/"):
        return better_auth_envelope
    return hosted_envelope


def hosted_envelope(error: PlantainError, request_id: str) -> dict[str, Any]:
    """A string in `error` for clients of the hosted service, and valid RFC 9457 besides."""
    return {
        "error": error.message,
        "code": error.code,
        "message": error.message,
        "type": error.type,
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "requestId": request_id,
        **error.extra,
    }


def better_auth_envelope(error: PlantainError, request_id: str) -> dict[str, Any]:
    """`{message, code}`, without a code for upstream errors that have none. Other errors keep all members."""
    if not isinstance(error, AuthError):
        return hosted_envelope(error, request_id)
    body = {"message": error.message, "error": error.message}
    return {**body, "code": error.code} if error.code else body


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
            return InternalError("Internal error; see the server's log.")
