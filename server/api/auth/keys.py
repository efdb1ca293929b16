"""Better Auth's api-key plugin: a user's own `bnp_` keys. Only a session opens these, never a key."""

import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.accounts import keys
from server.api.auth import cookies, schemas
from server.api.auth.dependencies import PREFIX, SignedIn, guard
from server.api.auth.schemas import key_json
from server.api.dependencies import ServicesDep
from server.auth.errors import AuthError, invalid_body
from server.auth.sessions import DAY_S, Session
from server.timestamps import iso_or_none

router = APIRouter(prefix=PREFIX + "/api-key", dependencies=[Depends(guard)])

CREATE = {"name": "string?", "expiresIn": "number|null?", "prefix": "string?"}
UPDATE = {"keyId": "string", "name": "string?", "enabled": "boolean?", "expiresIn": "number|null?"}
SERVER_ONLY = {
    "remaining", "refillAmount", "refillInterval", "rateLimitMax", "rateLimitTimeWindow", "rateLimitEnabled",
    "permissions",
}  # fmt: skip
LONGEST = 32
PREFIX_FORM = re.compile(r"[A-Za-z0-9_-]*")


async def owner(request: Request, services: ServicesDep) -> Session:
    """On the routes that make and change keys, upstream has a code of its own for this."""
    if session := await cookies.current_session(request, services):
        return session
    raise _unauthorized_session()


Owner = Annotated[Session, Depends(owner)]


@router.post("/create")
async def create(request: Request, session: Owner, services: ServicesDep) -> JSONResponse:
    """The key is in this answer, and never again."""
    body = await schemas.read(request, CREATE)
    _check(body, session)
    name, prefix = body.get("name"), body.get("prefix")
    if name is not None and len(name) > LONGEST:
        raise _bad_name()
    if prefix is not None and not 1 <= len(prefix) <= LONGEST:
        raise AuthError(400, "INVALID_PREFIX_LENGTH", "The prefix length is either too large or too small.")
    now = services.clock()
    row, key = await services.database.transaction(
        keys.create,
        session.user_id,
        now,
        name=name,
        prefix=prefix,
        expires_at=_expiry(body, now),
        metadata=body.get("metadata"),
    )
    return JSONResponse(key_json(row, key))


@router.get("/list")
async def list_keys(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    query = request.query_params
    limit, offset = (_whole(query.get(name), name) for name in ("limit", "offset"))
    rows = await services.database.run(
        keys.listed,
        session.user_id,
        sort_by=query.get("sortBy", ""),
        descending=query.get("sortDirection") == "desc",
    )
    start = offset or 0
    page = rows[start:] if limit is None else rows[start : start + limit]
    echoed = {name: value for name, value in (("limit", limit), ("offset", offset)) if value is not None}
    return JSONResponse({"apiKeys": [key_json(row) for row in page], "total": len(rows), **echoed})


@router.get("/get")
async def get(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    key_id = request.query_params.get("id")
    if key_id is None:
        raise invalid_body("[query.id] Invalid input: expected string, received undefined")
    return JSONResponse(key_json(await services.database.run(keys.of_user, session.user_id, key_id)))


@router.post("/update")
async def update(request: Request, session: Owner, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, UPDATE)
    _check(body, session)
    if "name" in body and not 1 <= len(body["name"]) <= LONGEST:
        raise _bad_name()
    changes: dict[str, Any] = {name: body[name] for name in ("name", "enabled") if name in body}
    if "expiresIn" in body:
        changes["expiresAt"] = iso_or_none(_expiry(body, services.clock()))
    if body.get("metadata") is not None:
        changes["metadata"] = json.dumps(body["metadata"])
    if not changes:
        raise AuthError(400, "NO_VALUES_TO_UPDATE", "No values to update.")
    row = await services.database.transaction(keys.update, session.user_id, body["keyId"], changes, services.clock())
    return JSONResponse(key_json(row))


@router.post("/delete")
async def delete(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    """The key stops working at once."""
    body = await schemas.read(request, {"keyId": "string"})
    await services.database.transaction(keys.delete, session.user_id, body["keyId"])
    return JSONResponse({"success": True})


def _check(body: dict[str, Any], session: Session) -> None:
    if body.get("userId", session.user_id) != session.user_id:
        raise _unauthorized_session()
    if any(body.get(name) is not None for name in SERVER_ONLY):
        text = "The property you're trying to set can only be set from the server auth instance only."
        raise AuthError(400, "SERVER_ONLY_PROPERTY", text)
    if not PREFIX_FORM.fullmatch(body.get("prefix", "")):
        text = "[body.prefix] Invalid prefix format, must be alphanumeric and contain only underscores and hyphens."
        raise invalid_body(text)
    if not isinstance(body.get("metadata"), dict | None):
        raise AuthError(400, "INVALID_METADATA_TYPE", "metadata must be an object or undefined")


def _expiry(body: dict[str, Any], now: float) -> float | None:
    """From a day to a year."""
    seconds = body.get("expiresIn")
    if seconds is None:
        return None
    if seconds < DAY_S:
        raise AuthError(400, "EXPIRES_IN_IS_TOO_SMALL", "The expiresIn is smaller than the predefined minimum value.")
    if seconds > 365 * DAY_S:
        raise AuthError(400, "EXPIRES_IN_IS_TOO_LARGE", "The expiresIn is larger than the predefined maximum value.")
    return now + seconds


def _whole(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise invalid_body(f"[query.{name}] Invalid input: expected number, received NaN")
    return int(text)


def _bad_name() -> AuthError:
    return AuthError(400, "INVALID_NAME_LENGTH", "The name length is either too large or too small.")


def _unauthorized_session() -> AuthError:
    return AuthError(401, "UNAUTHORIZED_SESSION", "Unauthorized or invalid session")
