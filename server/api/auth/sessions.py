"""Better Auth's core routes: sign-up, sign-in, sign-out and sessions."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.accounts import keys, users
from server.api import origins
from server.api.auth import cookies, schemas
from server.api.auth.dependencies import PREFIX, SignedIn, check_email, check_fields, check_new_password, guard
from server.api.auth.keys import key_not_found
from server.api.auth.schemas import key_session_json, session_json, user_json
from server.api.dependencies import ServicesDep
from server.auth import credentials, sessions
from server.auth.errors import AuthError, banned, invalid_credentials
from server.errors import PlantainError
from server.services import Services

router = APIRouter(prefix=PREFIX, dependencies=[Depends(guard)])
not_found_router = APIRouter(include_in_schema=False)
"""The catch-all 404 of `/api/auth`; included after all other routes."""

SIGN_UP = {
    "name": "string", "email": "email", "password": "string", "image": "string?", "callbackURL": "string?",
    "rememberMe": "boolean?",
}  # fmt: skip
SIGN_IN = {"email": "string", "password": "string", "callbackURL": "string?", "rememberMe": "boolean?"}
KEY_TEXTS = {
    "INVALID_API_KEY": "Invalid API key.",
    "KEY_DISABLED": "API Key is disabled",
    "KEY_EXPIRED": "API Key has expired",
}
SAFE_IN_URLS = ":/?#[]@!$&'()*+,;=%"
NOT_STORED = {"Cache-Control": "no-store", "Pragma": "no-cache"}


@router.get("/ok")
async def ok() -> JSONResponse:
    return JSONResponse({"ok": True})


@router.post("/sign-up/email")
async def sign_up(request: Request, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, SIGN_UP, form=True)
    _check_callback(request, services, body)
    check_fields(body)
    check_new_password(body["password"])
    password = await services.auth.passwords.hash(body["password"])
    user_id = await services.database.transaction(
        credentials.sign_up, body["name"], body["email"], body.get("image"), password, services.clock()
    )
    options = cookies.session_options(request, remember=body.get("rememberMe", True))
    token = await cookies.open_session(request, services, user_id, options)
    user = await services.database.run(users.user, user_id)
    return JSONResponse({"token": token, "user": user_json(user)})


@router.post("/sign-in/email")
async def sign_in(request: Request, services: ServicesDep) -> JSONResponse:
    """A wrong password and an unknown address take the same time and get the same response."""
    body = await schemas.read(request, SIGN_IN, form=True)
    _check_callback(request, services, body)
    check_email(body["email"])
    user = await services.database.run(credentials.find_by_email, body["email"])
    stored = user["password"] if user else None
    if not await services.auth.passwords.matches(stored, body["password"]) or not user:
        raise invalid_credentials()
    options = cookies.session_options(request, remember=body.get("rememberMe", True))
    token = await services.database.transaction(
        credentials.sign_in, services.auth.secret, user["id"], user["password"], services.clock(), **options
    )
    cookies.set_session_cookies(request, services, token, remember=options["remember"])
    url = {"url": body["callbackURL"]} if body.get("callbackURL") else {}
    answer = {"redirect": bool(url), "token": token, **url, "user": user_json(user)}
    return JSONResponse(answer, headers={"Location": quote(url["url"], safe=SAFE_IN_URLS)} if url else None)


@router.post("/sign-out")
async def sign_out(request: Request, services: ServicesDep) -> JSONResponse:
    """Succeeds without a session too."""
    if session := await cookies.current_session(request, services, renews=False):
        await services.database.run(sessions.revoke, session.user_id, session.token)
    cookies.clear_session_cookies(request, services)
    return JSONResponse({"success": True})


@router.get("/get-session")
async def get_session(request: Request, services: ServicesDep) -> JSONResponse:
    """`null` without a session. The only route of these that an API key opens."""
    if key := cookies.api_key(request):
        return await _session_of_key(services, key)
    renews = request.query_params.get("disableRefresh", "").lower() != "true"
    session = await cookies.current_session(request, services, renews=renews)
    if session is None:
        if cookies.token_of(request, services):
            cookies.clear_session_cookies(request, services)
        return JSONResponse(None, headers=NOT_STORED)
    return JSONResponse({"session": session_json(session), "user": user_json(session.user)}, headers=NOT_STORED)


@router.post("/get-session")
async def refuse_deferred_refresh() -> JSONResponse:
    text = "POST method requires deferSessionRefresh to be enabled in session config"
    raise AuthError(405, "METHOD_NOT_ALLOWED_DEFER_SESSION_REQUIRED", text, {"Allow": "GET", **NOT_STORED})


@router.get("/list-sessions")
async def list_sessions(session: SignedIn, services: ServicesDep) -> JSONResponse:
    """All of a user's sessions with their tokens; needs a fresh session."""
    if not session.is_fresh(services.clock()):
        raise AuthError(403, "SESSION_NOT_FRESH", "Session is not fresh")
    found = await services.database.run(sessions.of_user, services.auth.secret, session.user_id, services.clock())
    return JSONResponse([session_json(each) for each in found])


@router.post("/revoke-session")
async def revoke_session(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    """Succeeds for an unknown token too, and for another user's, which is not revoked."""
    body = await schemas.read(request, {"token": "string"})
    await services.database.run(sessions.revoke, session.user_id, body["token"])
    if body["token"] == session.token:
        cookies.clear_session_cookies(request, services)
    return JSONResponse({"status": True})


@router.post("/revoke-sessions")
async def revoke_sessions(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    await services.database.run(sessions.revoke_all, session.user_id)
    cookies.clear_session_cookies(request, services)
    return JSONResponse({"status": True})


@router.post("/revoke-other-sessions")
async def revoke_other_sessions(session: SignedIn, services: ServicesDep) -> JSONResponse:
    await services.database.run(sessions.revoke_all, session.user_id, session.token)
    return JSONResponse({"status": True})


async def _session_of_key(services: Services, key: str) -> JSONResponse:
    try:
        caller = await services.database.run(keys.authenticate, key, services.clock())
    except PlantainError as error:
        raise AuthError(error.status, error.code, KEY_TEXTS.get(error.code, error.message), error.headers) from None
    user = await services.database.run(users.user, caller.user_id)
    if sessions.is_banned(user, services.clock()):
        raise banned()
    with key_not_found():
        row = await services.database.run(keys.find_key, caller.key_id)
    session = key_session_json(row, key, services.clock(), sessions.LIFETIME_S)
    return JSONResponse({"user": user_json(user), "session": session}, headers=NOT_STORED)


def _check_callback(request: Request, services: Services, body: Mapping[str, Any]) -> None:
    origins.check_redirect(body.get("callbackURL"), "callbackURL", origins.for_pages(request, services.settings))


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@not_found_router.api_route(PREFIX, methods=METHODS)
@not_found_router.api_route(PREFIX + "/{rest:path}", methods=METHODS)
async def not_found() -> Response:
    """Unknown paths and wrong methods: 404 without a body, as upstream."""
    return Response(status_code=404)
