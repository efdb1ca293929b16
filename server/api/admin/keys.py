"""Admin routes: the API keys of all users."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, Field

from server.accounts import admin, keys
from server.api.dependencies import Admin, Name, ServicesDep, StrictBody, admin_caller, audited, body_of, schema_of
from server.services import Services

router = APIRouter(prefix="/api/admin/keys")

Scopes = Annotated[list[Literal["generate", "read", "admin"]], Field(min_length=1)]
PerMinute = Annotated[int, Field(ge=1)]


class NewKey(StrictBody):
    user_id: str
    name: Name | None = None
    scopes: Scopes | None = None
    per_minute: PerMinute | None = None
    expires_at: AwareDatetime | None = None


class KeyChange(StrictBody):
    """Fields left out stay as they are; an explicit null lifts a limit."""

    name: Name | None = None
    scopes: Scopes | None = None
    per_minute: PerMinute | None = None


@router.get("")
async def list_keys(_: Admin, services: ServicesDep, user: str | None = None) -> JSONResponse:
    rows = await services.database.run(keys.list_keys, user)
    return JSONResponse({"keys": [key_json(row) for row in rows], "nextCursor": None})


@router.post("", openapi_extra=schema_of(NewKey))
async def create_key(
    caller: Admin, services: ServicesDep, body: Annotated[NewKey, Depends(body_of(NewKey, admin_caller))]
) -> JSONResponse:
    """The only response with the key in clear."""
    expires_at = body.expires_at.timestamp() if body.expires_at else None
    key_id, key = await audited(
        services,
        caller,
        admin.create_key,
        body.user_id,
        body.name,
        expires_at=expires_at,
        scopes=body.scopes,
        per_minute=body.per_minute,
    )
    return JSONResponse({**await _key(services, key_id), "key": key}, status_code=201)


@router.patch("/{key_id}", openapi_extra=schema_of(KeyChange))
async def change_key(
    key_id: str,
    caller: Admin,
    services: ServicesDep,
    body: Annotated[KeyChange, Depends(body_of(KeyChange, admin_caller))],
) -> JSONResponse:
    await audited(services, caller, admin.change_key, key_id, **body.model_dump(exclude_unset=True))
    return JSONResponse(await _key(services, key_id))


@router.delete("/{key_id}")
async def revoke_key(key_id: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    """The key stops working at once, and stays in the list."""
    await audited(services, caller, admin.revoke_key, key_id)
    return JSONResponse(await _key(services, key_id))


def key_json(row: dict[str, Any]) -> dict[str, Any]:
    scopes = keys.scopes_of(row["permissions"])
    return {
        "id": row["id"],
        "name": row["name"],
        "start": row["start"],
        "userId": row["referenceId"],
        "email": row["email"],
        "enabled": bool(row["enabled"]),
        "scopes": None if scopes is None else sorted(scopes),
        "perMinute": row["rateLimitMax"] if row["rateLimitEnabled"] else None,
        "lastUsedAt": row["lastRequest"],
        "expiresAt": row["expiresAt"],
        "createdAt": row["createdAt"],
    }


async def _key(services: Services, key_id: str) -> dict[str, Any]:
    return key_json(await services.database.run(keys.find_key, key_id))
