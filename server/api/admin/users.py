"""Admin routes: users, their plans, credits and bans."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, Field

from server.accounts import admin, ledger, users
from server.api.dependencies import (
    Admin,
    Limit,
    Name,
    ServicesDep,
    StrictBody,
    admin_caller,
    audited,
    body_of,
    schema_of,
)
from server.api.schemas import entries_json, paginated
from server.services import Services

router = APIRouter(prefix="/api/admin")


class NewUser(StrictBody):
    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=320)]
    name: str = ""
    plan: str = "free"
    role: Literal["user", "admin"] = "user"


class UserChange(StrictBody):
    name: Name | None = None
    plan: str | None = None
    role: Literal["user", "admin"] | None = None


class Grant(StrictBody):
    amount: Annotated[int, Field(ge=-(10**12), le=10**12)]
    note: str = "granted"


class Ban(StrictBody):
    reason: str | None = None
    expires_at: AwareDatetime | None = None


@router.get("/users")
async def list_users(
    _: Admin, services: ServicesDep, cursor: str | None = None, limit: Limit = 50, search: str | None = None
) -> JSONResponse:
    rows = await services.database.run(admin.list_users, cursor, limit, search)
    return JSONResponse(paginated("users", [user_json(row) for row in rows], limit))


@router.post("/users", openapi_extra=schema_of(NewUser))
async def create_user(
    caller: Admin, services: ServicesDep, body: Annotated[NewUser, Depends(body_of(NewUser, admin_caller))]
) -> JSONResponse:
    plan = services.plans.known(body.plan)
    user_id = await audited(services, caller, admin.create_user, body.email, body.name, plan=plan, role=body.role)
    return JSONResponse(await _user(services, user_id), status_code=201)


@router.get("/users/{user_id}")
async def read_user(user_id: str, _: Admin, services: ServicesDep) -> JSONResponse:
    return JSONResponse(await _user(services, user_id))


@router.patch("/users/{user_id}", openapi_extra=schema_of(UserChange))
async def change_user(
    user_id: str,
    caller: Admin,
    services: ServicesDep,
    body: Annotated[UserChange, Depends(body_of(UserChange, admin_caller))],
) -> JSONResponse:
    if body.plan is not None:
        services.plans.known(body.plan)
    await audited(services, caller, admin.change_user, user_id, **body.model_dump(exclude_none=True))
    return JSONResponse(await _user(services, user_id))


@router.post("/users/{user_id}/grants", openapi_extra=schema_of(Grant))
async def grant(
    user_id: str,
    caller: Admin,
    services: ServicesDep,
    body: Annotated[Grant, Depends(body_of(Grant, admin_caller))],
) -> JSONResponse:
    """A negative amount takes credits back, never below zero."""
    balance = await audited(services, caller, admin.grant, user_id, body.amount, body.note)
    return JSONResponse({"balance": balance}, status_code=201)


@router.get("/users/{user_id}/ledger")
async def read_ledger(
    user_id: str, _: Admin, services: ServicesDep, cursor: int | None = None, limit: Limit = 50
) -> JSONResponse:
    await _user(services, user_id)
    rows = await services.database.run(ledger.entries, user_id, cursor, limit)
    return JSONResponse(entries_json(rows, limit))


@router.post("/users/{user_id}/ban", openapi_extra=schema_of(Ban))
async def ban(
    user_id: str, caller: Admin, services: ServicesDep, body: Annotated[Ban, Depends(body_of(Ban, admin_caller))]
) -> JSONResponse:
    await audited(services, caller, admin.ban, user_id, body.reason, _timestamp(body.expires_at))
    return JSONResponse(await _user(services, user_id))


@router.delete("/users/{user_id}/ban")
async def unban(user_id: str, caller: Admin, services: ServicesDep) -> JSONResponse:
    await audited(services, caller, admin.unban, user_id)
    return JSONResponse(await _user(services, user_id))


def user_json(row: dict[str, Any]) -> dict[str, Any]:
    same = ("id", "name", "email", "role", "plan", "balance", "banReason", "banExpires", "createdAt", "deletedAt")
    return {**{name: row[name] for name in same}, "banned": bool(row["banned"])}


async def _user(services: Services, user_id: str) -> dict[str, Any]:
    return user_json(await services.database.run(users.user, user_id))


def _timestamp(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment else None
