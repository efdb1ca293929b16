"""Checks before the routes of `/api/auth`: rate limit, origin, session and the rules for fields."""

from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from server.api import origins
from server.api.auth import cookies, schemas
from server.api.dependencies import ServicesDep
from server.auth.errors import AuthError, too_many, unauthorized
from server.auth.passwords import MAX_LENGTH, MIN_LENGTH, length_of
from server.auth.sessions import Session

PREFIX = "/api/auth"
SIGN_IN_PATHS = {"/sign-in/email", "/sign-up/email"}


async def guard(request: Request, services: ServicesDep) -> None:
    """Checks the rate limit and the origin of every call. Raises AuthError."""
    path = request.url.path.removeprefix(PREFIX)
    if services.settings.limit_sign_in:
        address = request.client.host if request.client else ""
        if retry_after_s := services.auth.sign_in_limiter.retry_after_s(address, path, services.clock()):
            raise too_many(retry_after_s)
    pages = origins.for_pages(request, services.settings)
    origins.check_auth_call(request, pages, signs_in=path in SIGN_IN_PATHS)


async def signed_in(request: Request, services: ServicesDep) -> Session:
    """Raises AuthError without a session."""
    if session := await cookies.current_session(request, services):
        return session
    raise unauthorized()


SignedIn = Annotated[Session, Depends(signed_in)]


def check_email(email: str) -> None:
    """For signing in: also takes the owner's address, which is at localhost."""
    if not schemas.is_email(email) and not schemas.LOCAL_EMAIL.fullmatch(email):
        raise AuthError(400, "INVALID_EMAIL", "Invalid email")


def check_new_password(password: str) -> None:
    if length_of(password) < MIN_LENGTH:
        raise AuthError(400, "PASSWORD_TOO_SHORT", "Password too short")
    if length_of(password) > MAX_LENGTH:
        raise AuthError(400, "PASSWORD_TOO_LONG", "Password too long")


def check_fields(body: dict[str, object]) -> None:
    """Refuses fields that only an admin may set."""
    for name in ("role", "banned", "banReason", "banExpires"):
        if name in body:
            raise AuthError(400, "FIELD_NOT_ALLOWED", f"{name} is not allowed to be set")
