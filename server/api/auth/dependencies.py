"""What stands before the routes of `/api/auth`: the count of attempts, the origin, the session, the fields' rules."""

from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from server.api import origins
from server.api.auth import cookies, schemas
from server.api.dependencies import ServicesDep
from server.auth.errors import AuthError, too_many, unauthorized
from server.auth.passwords import LONGEST, SHORTEST, length_of
from server.auth.sessions import Session

PREFIX = "/api/auth"
SIGNING_IN = {"/sign-in/email", "/sign-up/email"}


async def guard(request: Request, services: ServicesDep) -> None:
    """Raises AuthError."""
    path = request.url.path.removeprefix(PREFIX)
    if services.settings.limit_sign_in:
        address = request.client.host if request.client else ""
        if retry_after_s := services.auth.sign_in_limiter.retry_after_s(address, path, services.clock()):
            raise too_many(retry_after_s)
    pages = origins.for_pages(request, services.settings)
    origins.check_auth_call(request, pages, signs_in=path in SIGNING_IN)


async def signed_in(request: Request, services: ServicesDep) -> Session:
    if session := await cookies.current_session(request, services):
        return session
    raise unauthorized()


SignedIn = Annotated[Session, Depends(signed_in)]


def check_email(email: str) -> None:
    """For signing in: the owner's address is one that no mail could reach."""
    if not schemas.is_email(email) and not schemas.LOCAL_EMAIL.fullmatch(email):
        raise AuthError(400, "INVALID_EMAIL", "Invalid email")


def check_new_password(password: str) -> None:
    if length_of(password) < SHORTEST:
        raise AuthError(400, "PASSWORD_TOO_SHORT", "Password too short")
    if length_of(password) > LONGEST:
        raise AuthError(400, "PASSWORD_TOO_LONG", "Password too long")


def check_fields(body: dict[str, object]) -> None:
    """What only an admin sets."""
    for name in ("role", "banned", "banReason", "banExpires"):
        if name in body:
            raise AuthError(400, "FIELD_NOT_ALLOWED", f"{name} is not allowed to be set")
