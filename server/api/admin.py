"""Running the server, part one: users, their plans, credits and bans."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from server import accounts, acts, audit, ledger
from server.acts import Acting
from server.api.account import Limit, entries_json
from server.api.common import Admin, Served, admin, body_of, schema_of
from server.services import Services

router = APIRouter(prefix="/api/admin")

Name = Annotated[str, Field(min_length=1, max_length=200)]


class Order(BaseModel):
    """What an admin sends: nothing unknown is let through, lest a misspelt limit be no limit."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class NewUser(Order):
    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=320)]
    name: str = ""
    plan: str = "free"
    role: Literal["user", "admin"] = "user"


class UserChange(Order):
    name: Name | None = None
    plan: str | None = None
    role: Literal["user", "admin"] | None = None


class Grant(Order):
    amount: Annotated[int, Field(ge=-(10**12), le=10**12)]
    note: str = "granted"


class Ban(Order):
    reason: str | None = None
    expires_at: AwareDatetime | None = None


async def act(served: Services, caller: accounts.Caller, do: Any, *values: Any, **options: Any) -> Any:
    """One act in one transaction, with its line in the audit log."""

    def in_one_transaction() -> Any:
        with served.store.atomic() as db:
            return do(Acting(db, audit.Actor.of(caller), served.clock()), *values, **options)

    return await served.store.call(in_one_transaction)


@router.get("/users")
async def list_users(
    _: Admin, served: Served, cursor: str | None = None, limit: Limit = 50, search: str | None = None
) -> JSONResponse:
    rows = await served.store.call(acts.users, served.store.db, cursor, limit, search)
    next_cursor = rows[-1]["id"] if len(rows) == limit else None
    return JSONResponse({"users": [user_json(row) for row in rows], "nextCursor": next_cursor})


@router.post("/users", openapi_extra=schema_of(NewUser))
async def create_user(
    caller: Admin, served: Served, body: Annotated[NewUser, Depends(body_of(NewUser, admin))]
) -> JSONResponse:
    plan = served.plans.known(body.plan)
    user_id = await act(served, caller, acts.create_user, body.email, body.name, plan=plan, role=body.role)
    return JSONResponse(await _user(served, user_id), status_code=201)


@router.get("/users/{user_id}")
async def read_user(user_id: str, _: Admin, served: Served) -> JSONResponse:
    return JSONResponse(await _user(served, user_id))


@router.patch("/users/{user_id}", openapi_extra=schema_of(UserChange))
async def change_user(
    user_id: str, caller: Admin, served: Served, body: Annotated[UserChange, Depends(body_of(UserChange, admin))]
) -> JSONResponse:
    if body.plan is not None:
        served.plans.known(body.plan)
    await act(served, caller, acts.change_user, user_id, **body.model_dump(exclude_none=True))
    return JSONResponse(await _user(served, user_id))


@router.post("/users/{user_id}/grants", openapi_extra=schema_of(Grant))
async def grant(
    user_id: str, caller: Admin, served: Served, body: Annotated[Grant, Depends(body_of(Grant, admin))]
) -> JSONResponse:
    """A negative amount takes back, never below zero."""
    balance = await act(served, caller, acts.grant, user_id, body.amount, body.note)
    return JSONResponse({"balance": balance}, status_code=201)


@router.get("/users/{user_id}/ledger")
async def read_ledger(
    user_id: str, _: Admin, served: Served, cursor: int | None = None, limit: Limit = 50
) -> JSONResponse:
    await _user(served, user_id)
    rows = await served.store.call(ledger.entries, served.store.db, user_id, cursor, limit)
    return JSONResponse(entries_json(rows, limit))


@router.post("/users/{user_id}/ban", openapi_extra=schema_of(Ban))
async def ban(
    user_id: str, caller: Admin, served: Served, body: Annotated[Ban, Depends(body_of(Ban, admin))]
) -> JSONResponse:
    await act(served, caller, acts.ban, user_id, body.reason, _timestamp(body.expires_at))
    return JSONResponse(await _user(served, user_id))


@router.delete("/users/{user_id}/ban")
async def unban(user_id: str, caller: Admin, served: Served) -> JSONResponse:
    await act(served, caller, acts.unban, user_id)
    return JSONResponse(await _user(served, user_id))


def user_json(row: dict[str, Any]) -> dict[str, Any]:
    same = ("id", "name", "email", "role", "plan", "balance", "banReason", "banExpires", "createdAt", "deletedAt")
    return {**{name: row[name] for name in same}, "banned": bool(row["banned"])}


async def _user(served: Services, user_id: str) -> dict[str, Any]:
    return user_json(await served.store.call(accounts.user, served.store.db, user_id))


def _timestamp(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment else None
