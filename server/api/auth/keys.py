"""Better Auth's api-key plugin: routes for a user's own API keys. They need a session; a key does not open them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.accounts import keys
from server.accounts.keys import KEY_PREFIX
from server.api.auth import cookies, schemas
from server.api.auth.dependencies import PREFIX, SignedIn, guard
from server.api.auth.schemas import key_json
from server.api.dependencies import ServicesDep
from server.auth.errors import AuthError, invalid_body
from server.auth.sessions import DAY_S, Session
from server.errors import NotFound
from server.timestamps import iso_or_none

router = APIRouter(prefix=PREFIX + "/api-key", dependencies=[Depends(guard)])

CREATE = {"name": "string?", "expiresIn": "number|null?", "prefix": "string?"}
UPDATE = {"keyId": "string", "name": "string?", "enabled": "boolean?", "expiresIn": "number|null?"}
SERVER_ONLY = {
    "remaining", "refillAmount", "refillInterval", "rateLimitMax", "rateLimitTimeWindow", "rateLimitEnabled",
    "permissions",
}  # fmt: skip
MAX_LENGTH = 32
"""Of names and prefixes."""
PREFIX_FORM = re.compile(r"[A-Za-z0-9_-]*")


async def owner(request: Request, services: ServicesDep) -> Session:
    """The session on the routes that create and change keys, where upstream has another code for its absence."""
    if session := await cookies.current_session(request, services):
        return session
    raise _unauthorized_session()


Owner = Annotated[Session, Depends(owner)]


@router.post("/create")
async def create(request: Request, session: Owner, services: ServicesDep) -> JSONResponse:
    """The only response with the key in clear."""
    body = await schemas.read(request, CREATE)
    _check(body, session)
    name, prefix = body.get("name"), body.get("prefix")
    if name is not None and len(name) > MAX_LENGTH:
        raise _bad_name()
    if prefix is not None and not 1 <= len(prefix) <= MAX_LENGTH:
        raise AuthError(400, "INVALID_PREFIX_LENGTH", "The prefix length is either too large or too small.")
    now = services.clock()
    key_id, key = await services.database.transaction(
        keys.create_key,
        session.user_id,
        name,
        now,
        prefix=KEY_PREFIX if prefix is None else prefix,
        expires_at=_expiry(body, now),
        metadata=body.get("metadata"),
    )
    return JSONResponse(key_json(await services.database.run(keys.find_key, key_id), key))


@router.get("/list")
async def list_keys(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    query = request.query_params
    limit, offset = (_integer(query.get(name), name) for name in ("limit", "offset"))
    rows = await services.database.run(
        keys.list_keys,
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
    with key_not_found():
        return JSONResponse(key_json(await services.database.run(keys.find_key, key_id, session.user_id)))


@router.post("/update")
async def update(request: Request, session: Owner, services: ServicesDep) -> JSONResponse:
    body = await schemas.read(request, UPDATE)
    _check(body, session)
    if "name" in body and not 1 <= len(body["name"]) <= MAX_LENGTH:
        raise _bad_name()
    changes: dict[str, Any] = {name: body[name] for name in ("name", "enabled") if name in body}
    if "expiresIn" in body:
        changes["expiresAt"] = iso_or_none(_expiry(body, services.clock()))
    if body.get("metadata") is not None:
        changes["metadata"] = json.dumps(body["metadata"])
    if not changes:
        raise AuthError(400, "NO_VALUES_TO_UPDATE", "No values to update.")
    with key_not_found():
        row = await services.database.transaction(
            keys.change_key, body["keyId"], changes, services.clock(), session.user_id
        )
    return JSONResponse(key_json(row))


@router.post("/delete")
async def delete(request: Request, session: SignedIn, services: ServicesDep) -> JSONResponse:
    """The key stops working at once."""
    body = await schemas.read(request, {"keyId": "string"})
    with key_not_found():
        await services.database.transaction(keys.delete_key, body["keyId"], session.user_id)
    return JSONResponse({"success": True})


@contextmanager
def key_not_found() -> Iterator[None]:
    """Turns NotFound into Better Auth's error."""
    try:
        yield
    except NotFound:
        raise AuthError(404, "KEY_NOT_FOUND", "API Key not found") from None


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
    """When the key expires: in 1 to 365 days, or never. Raises AuthError."""
    seconds = body.get("expiresIn")
    if seconds is None:
        return None
    if seconds < DAY_S:
        raise AuthError(400, "EXPIRES_IN_IS_TOO_SMALL", "The expiresIn is smaller than the predefined minimum value.")
    if seconds > 365 * DAY_S:
        raise AuthError(400, "EXPIRES_IN_IS_TOO_LARGE", "The expiresIn is larger than the predefined maximum value.")
    return now + seconds


def _integer(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise invalid_body(f"[query.{name}] Invalid input: expected number, received NaN")
    return int(text)


def _bad_name() -> AuthError:
    return AuthError(400, "INVALID_NAME_LENGTH", "The name length is either too large or too small.")


def _unauthorized_session() -> AuthError:
    return AuthError(401, "UNAUTHORIZED_SESSION", "Unauthorized or invalid session")
