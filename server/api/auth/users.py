"""Better Auth's routes for one's own account: name, password, password reset by mail, deletion."""

from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server import settings
from server.accounts import users
from server.api import origins
from server.api.auth import cookies, schemas
from server.api.auth.dependencies import PREFIX, SignedIn, check_fields, check_new_password, guard
from server.api.auth.schemas import account_json, user_json
from server.api.dependencies import ServicesDep
from server.auth import credentials
from server.auth.errors import AuthError, invalid_body, invalid_password, invalid_token, no_fields
from server.auth.mail import Mail
from server.auth.sessions import Session
from server.services import Services

router = APIRouter(prefix=PREFIX, dependencies=[Depends(guard)])

CHANGE_PASSWORD = {"currentPassword": "string", "newPassword": "string", "revokeOtherSessions": "boolean?"}
DELETE = {"password": "string?", "token": "string?", "callbackURL": "string?"}
RESET = {"newPassword": "string", "token": "string?"}
SENT = "If this email exists in our system, check your email for the reset link"
SUBJECT = "Reset your password"
RESET_TEXT = """A password reset was requested for your account at {address}.

To choose a new password within the next hour, open

{link}

If you did not request it, ignore this mail: your password stays as it is.
"""


@router.post("/update-user")
async def update_user(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, {"name": "string?", "image": "string|null?"})
    if body.get("email"):
        raise AuthError(400, "EMAIL_CAN_NOT_BE_UPDATED", "Email can not be updated")
    check_fields(body)
    changes: dict[str, str | None] = {name: body[name] for name in ("name", "image") if name in body}
    if not changes:
        raise no_fields()
    await services.database.transaction(credentials.update_user, session.user_id, changes, services.clock())
    cookies.set_session_cookies(request, services, session.token, remember=not session.is_short)
    return JSONResponse({"status": True})


@router.post("/change-password")
async def change_password(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, CHANGE_PASSWORD)
    check_new_password(body["newPassword"])
    await _check_password(services, session, body["currentPassword"])
    password = await services.auth.passwords.hash(body["newPassword"])
    ends_sessions = body.get("revokeOtherSessions", False)
    change = credentials.change_password if ends_sessions else credentials.set_password
    await services.database.transaction(change, session.user_id, password, services.clock())
    token = None
    if ends_sessions:
        token = await cookies.open_session(
            request, services, session.user_id, cookies.session_options(request, remember=not session.is_short)
        )
    user = await services.database.run(users.user, session.user_id)
    return JSONResponse({"token": token, "user": user_json(user)})


@router.post("/verify-password")
async def verify_password(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, {"password": "string"})
    await _check_password(services, session, body["password"])
    return JSONResponse({"status": True})


@router.post("/forget-password")
@router.post("/request-password-reset")
async def request_password_reset(request: Request, services: ServicesDep) -> JSONResponse:
    """The response and its time are the same for unknown addresses. Clients of 1.3 use the first path."""
    body = await schemas.read(request, {"email": "email", "redirectTo": "string?"})
    origins.check_redirect(body.get("redirectTo"), "redirectTo", origins.for_redirects(services.settings))
    services.auth.mailer.run_in_background(_mail_reset(services, body["email"], body.get("redirectTo")))
    return JSONResponse({"status": True, "message": SENT})


@router.get("/reset-password/{token}")
async def follow_reset_link(token: str, request: Request, services: ServicesDep) -> Response:
    """Redirects from the mail to the page for a new password. Does not use the token up: mail scanners follow links."""
    target = request.query_params.get("callbackURL")
    if target is None:
        raise invalid_body("[query.callbackURL] Invalid input: expected string, received undefined")
    origins.check_redirect(target, "callbackURL", origins.for_redirects(services.settings))
    is_open = await services.database.run(credentials.is_reset_open, token, services.clock())
    result = {"token": token} if is_open else {"error": "INVALID_TOKEN"}
    location = _with_query(urljoin(settings.address_of(services.settings) + "/", target), result)
    return Response(status_code=302, headers={"Location": location, "Referrer-Policy": "no-referrer"})


@router.post("/reset-password")
async def reset_password(request: Request, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, RESET)
    token = body.get("token") or request.query_params.get("token")
    if not token:
        raise invalid_token()
    check_new_password(body["newPassword"])
    if not await services.database.run(credentials.is_reset_open, token, services.clock()):
        raise invalid_token()  # before hashing, which is slow
    password = await services.auth.passwords.hash(body["newPassword"])
    await services.database.transaction(credentials.reset_password, token, password, services.clock())
    return JSONResponse({"status": True})


@router.post("/delete-user")
async def delete_user(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    """Needs the password or a fresh session. Unfinished jobs are cancelled and files deleted."""
    body = await schemas.read(request, DELETE)
    if body.get("password") is not None:
        await _check_password(services, session, body["password"])
    elif body.get("token"):
        raise AuthError(404, "INVALID_TOKEN", "Invalid token")
    elif not session.is_fresh(services.clock()):
        raise AuthError(400, "SESSION_EXPIRED", "Session expired. Re-authenticate to perform this action.")
    await _delete_user(services, session.user_id)
    cookies.clear_session_cookies(request, services)
    return JSONResponse({"success": True, "message": "User deleted"})


@router.get("/list-accounts")
async def list_accounts(session: SignedIn, services: ServicesDep) -> JSONResponse:
    rows = await services.database.run(credentials.accounts_of, session.user_id)
    return JSONResponse([account_json(row) for row in rows])


@router.post("/send-verification-email")
async def send_verification_email() -> JSONResponse:
    raise AuthError(400, "VERIFICATION_EMAIL_NOT_ENABLED", "Verification email isn't enabled")


@router.get("/verify-email")
async def verify_email(request: Request) -> JSONResponse:
    if "token" not in request.query_params:
        raise invalid_body("[query.token] Invalid input: expected string, received undefined")
    raise AuthError(401, "INVALID_TOKEN", "Invalid token")


@router.post("/change-email")
async def change_email(session: SignedIn) -> JSONResponse:
    raise AuthError(400, "CHANGE_EMAIL_DISABLED", "Change email is disabled")


@router.post("/link-social")
@router.post("/sign-in/social")
async def sign_in_social() -> JSONResponse:
    raise AuthError(404, "PROVIDER_NOT_FOUND", "Provider not found")


async def _check_password(services: Services, session: Session, password: str) -> None:
    user: dict[str, Any] | None = await services.database.run(credentials.find_by_id, session.user_id)
    if user is None or user["password"] is None:
        raise AuthError(400, "CREDENTIAL_ACCOUNT_NOT_FOUND", "Credential account not found")
    if not await services.auth.passwords.matches(user["password"], password):
        raise invalid_password()


async def _mail_reset(services: Services, email: str, redirect_to: str | None) -> None:
    user: dict[str, Any] | None = await services.database.run(credentials.find_by_email, email)
    if user is None:
        return
    token = await services.database.transaction(credentials.open_reset, user["id"], services.clock())
    address = settings.address_of(services.settings)
    link = f"{address}{PREFIX}/reset-password/{token}?callbackURL={quote(redirect_to or '/', safe='')}"
    await services.auth.mailer.send(Mail(user["email"], SUBJECT, RESET_TEXT.format(address=address, link=link)))


def _with_query(url: str, more: dict[str, str]) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode([*parse_qsl(parts.query, keep_blank_values=True), *more.items()])).geturl()


async def _delete_user(services: Services, user_id: str) -> None:
    for job in await services.database.call(services.jobs.jobs, user_id, None, 10_000):
        if not job.is_final:
            await services.dispatcher.cancel(job.id)
    for name in await services.database.transaction(credentials.delete_user, user_id, services.clock()):
        await services.database.call(services.files.delete, name)
