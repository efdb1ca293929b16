"""Better Auth's core routes under `/api/auth`: signing up, in and out, and the sessions that come of it."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server import accounts
from server.api.common import Served
from server.auth import bodies, credentials, key_rows, origins, session_rows, sessions
from server.auth.errors import AuthError, banned, invalid_credentials
from server.auth.guard import PREFIX, SignedIn, check_email, check_fields, check_new_password, guard
from server.auth.shapes import key_session_json, session_json, user_json
from server.auth.transaction import in_transaction
from server.errors import PlantainError
from server.services import Services

router = APIRouter(prefix=PREFIX, dependencies=[Depends(guard)])
nowhere = APIRouter(include_in_schema=False)
"""To be included after all other auth routes."""

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
async def sign_up(request: Request, served: Served) -> JSONResponse:
    body = await bodies.read(request, SIGN_UP, form=True)
    _check_callback(request, served, body)
    check_fields(body)
    check_new_password(body["password"])
    password = await served.auth.passwords.hash(body["password"])
    user_id = await in_transaction(
        served, credentials.sign_up, body["name"], body["email"], body.get("image"), password, served.clock()
    )
    opening = sessions.opening(request, remember=body.get("rememberMe", True))
    token = await sessions.open_session(request, served, user_id, opening)
    user = await served.store.call(accounts.user, served.store.db, user_id)
    return JSONResponse({"token": token, "user": user_json(user)})


@router.post("/sign-in/email")
async def sign_in(request: Request, served: Served) -> JSONResponse:
    """A wrong password and an unknown address cost the same time and get the same answer."""
    body = await bodies.read(request, SIGN_IN, form=True)
    _check_callback(request, served, body)
    check_email(body["email"])
    user = await served.store.call(credentials.find, served.store.db, body["email"])
    stored = user["password"] if user else None
    if not await served.auth.passwords.matches(stored, body["password"]) or not user:
        raise invalid_credentials()
    opening = sessions.opening(request, remember=body.get("rememberMe", True))
    token = await in_transaction(
        served, credentials.enter, served.auth.secret, user["id"], user["password"], served.clock(), **opening
    )
    sessions.give(request, served, token, remember=opening["remember"])
    url = {"url": body["callbackURL"]} if body.get("callbackURL") else {}
    answer = {"redirect": bool(url), "token": token, **url, "user": user_json(user)}
    return JSONResponse(answer, headers={"Location": quote(url["url"], safe=SAFE_IN_URLS)} if url else None)


@router.post("/sign-out")
async def sign_out(request: Request, served: Served) -> JSONResponse:
    """Also for those who have no session any more."""
    if session := await sessions.current(request, served, renews=False):
        await served.store.call(session_rows.revoke, served.store.db, session.user_id, session.token)
    sessions.take(request, served)
    return JSONResponse({"success": True})


@router.get("/get-session")
async def get_session(request: Request, served: Served) -> JSONResponse:
    """`null` where there is none. An API key opens this one route of all."""
    if key := sessions.api_key(request):
        return await _session_of_key(served, key)
    renews = request.query_params.get("disableRefresh", "").lower() != "true"
    session = await sessions.current(request, served, renews=renews)
    if session is None:
        if sessions.token_of(request, served):
            sessions.take(request, served)
        return JSONResponse(None, headers=NOT_STORED)
    return JSONResponse({"session": session_json(session), "user": user_json(session.user)}, headers=NOT_STORED)


@router.post("/get-session")
async def refuse_deferred_refresh() -> JSONResponse:
    text = "POST method requires deferSessionRefresh to be enabled in session config"
    raise AuthError(405, "METHOD_NOT_ALLOWED_DEFER_SESSION_REQUIRED", text, {"Allow": "GET", **NOT_STORED})


@router.get("/list-sessions")
async def list_sessions(session: SignedIn, served: Served) -> JSONResponse:
    """The tokens of all of a user's sessions: for a fresh session only."""
    if not session.is_fresh(served.clock()):
        raise AuthError(403, "SESSION_NOT_FRESH", "Session is not fresh")
    found = await served.store.call(
        session_rows.of_user, served.store.db, served.auth.secret, session.user_id, served.clock()
    )
    return JSONResponse([session_json(each) for each in found])


@router.post("/revoke-session")
async def revoke_session(request: Request, session: SignedIn, served: Served) -> JSONResponse:
    """Also for an unknown token, or another user's, which is left alone."""
    body = await bodies.read(request, {"token": "string"})
    await served.store.call(session_rows.revoke, served.store.db, session.user_id, body["token"])
    if body["token"] == session.token:
        sessions.take(request, served)
    return JSONResponse({"status": True})


@router.post("/revoke-sessions")
async def revoke_sessions(request: Request, session: SignedIn, served: Served) -> JSONResponse:
    await served.store.call(session_rows.revoke_all, served.store.db, session.user_id)
    sessions.take(request, served)
    return JSONResponse({"status": True})


@router.post("/revoke-other-sessions")
async def revoke_other_sessions(session: SignedIn, served: Served) -> JSONResponse:
    await served.store.call(session_rows.revoke_all, served.store.db, session.user_id, session.token)
    return JSONResponse({"status": True})


async def _session_of_key(served: Services, key: str) -> JSONResponse:
    try:
        caller = await served.store.call(accounts.authenticate, served.store.db, key, served.clock())
    except PlantainError as error:
        raise AuthError(error.status, error.code, KEY_TEXTS.get(error.code, error.message), error.headers) from None
    user = await served.store.call(accounts.user, served.store.db, caller.user_id)
    if session_rows.is_banned(user, served.clock()):
        raise banned()
    row = await served.store.call(key_rows.of_user, served.store.db, caller.user_id, caller.key_id)
    session = key_session_json(row, key, served.clock(), session_rows.LIVES_S)
    return JSONResponse({"user": user_json(user), "session": session}, headers=NOT_STORED)


def _check_callback(request: Request, served: Services, body: Mapping[str, Any]) -> None:
    origins.check_redirect(body.get("callbackURL"), "callbackURL", origins.for_pages(request, served.settings))


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@nowhere.api_route(PREFIX, methods=METHODS)
@nowhere.api_route(PREFIX + "/{rest:path}", methods=METHODS)
async def not_found() -> Response:
    """Unknown paths and wrong methods: no body at all."""
    return Response(status_code=404)
