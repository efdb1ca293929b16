"""What routes share: the services, the caller, the body, and this server's address as the caller sees it."""
# FROM server.api.entrance: From a request to whoever sent it: an API key, a session, or on an open server anybody at this machine.

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from sqlite_utils import Database

from server.accounts import ledger, rate_limits, users
from server.accounts.admin import Actor, AdminContext, record
from server.accounts.authorization import ADMIN, CANCEL, GENERATE, READ, Access
from server.accounts.keys import KEY_PREFIX
from server.accounts.rate_limits import RateLimitStatus
from server.accounts.usage import Period
from server.accounts.users import Caller
from server.api import origins
from server.api.middleware import set_header
from server.errors import BadRequest, InvalidBody, Unauthorized, invalid_field
from server.services import Services


async def authorize_request(request: Request, services: Services, need: Access) -> Caller:
    """The caller, let in by the gate. Raises what keeps them out; see `server.errors`.

    A counted call's answer tells how many are left, whatever comes of it.
    """
    caller, status = await _authenticate(request, services, need)
    if status:
        set_rate_limit_headers(request, status)
    return caller


def set_rate_limit_headers(request: Request, status: RateLimitStatus) -> None:
    request.state.rate_limit_status = status
    for name, value in status.headers().items():
        set_header(request, name, value)


async def refresh_balance(request: Request, services: Services, user_id: str) -> int:
    """The balance as it is now; so are the jobs that the answer's headers count."""
    balance, unfinished = await services.database.run(_balance_and_unfinished, user_id)
    if status := getattr(request.state, "rate_limit_status", None):
        set_rate_limit_headers(request, replace(status, unfinished=unfinished))
    return balance


def _balance_and_unfinished(db: Database, user_id: str) -> tuple[int, int]:
    return ledger.balance(db, user_id), rate_limits.unfinished(db, user_id)


async def _authenticate(request: Request, services: Services, need: Access) -> tuple[Caller, RateLimitStatus | None]:
    authorizer, call, now = services.authorizer, services.database.call, services.clock()
    if services.settings.open:
        origins.check_host(request, services.settings)
        origins.check_call(request, origins.for_pages(request, services.settings))
        return await call(authorizer.authorize_local, need, now)
    token = _token(request)
    if key := token if token.startswith(KEY_PREFIX) else request.headers.get("x-api-key"):
        return await call(authorizer.authorize_key, key, need, now)
    if caller := await _session(request, services):
        return await call(authorizer.authorize, caller, need, now)
    if token:  # a key with a prefix of its own, from another server's database
        return await call(authorizer.authorize_key, token, need, now)
    raise Unauthorized("This needs a session or an API key: send Authorization: Bearer bnp_…")


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _session(request: Request, services: Services) -> Caller | None:
    if "authorization" not in request.headers and "cookie" not in request.headers:
        return None
    from server.api.auth.cookies import session_of

    return await session_of(request, services)


B = TypeVar("B", bound=BaseModel)
Entrance = Callable[[Request, Services], Awaitable[Caller]]

READING = frozenset({"GET", "HEAD"})

LARGE_BODY_BYTES = 2**20


def services(request: Request) -> Services:
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(services)]


async def caller(request: Request, services: ServicesDep) -> Caller:
    """Whoever calls, let in by the gate: to look, or to make something, as the method says."""
    return await authorize_request(request, services, READ if request.method in READING else GENERATE)


async def cancelling_caller(request: Request, services: ServicesDep) -> Caller:
    """For what ends work: never refused for having called too often."""
    return await authorize_request(request, services, CANCEL)


async def admin(request: Request, services: ServicesDep) -> Caller:
    """By role, or by a key with the scope."""
    return await authorize_request(request, services, ADMIN)


CurrentCaller = Annotated[Caller, Depends(caller)]
CancellingCaller = Annotated[Caller, Depends(cancelling_caller)]
Admin = Annotated[Caller, Depends(admin)]


def base_url(request: Request, services: ServicesDep) -> str:
    """This server's address, without a slash at its end."""
    return (services.settings.public_url or str(request.base_url)).rstrip("/")


BaseUrl = Annotated[str, Depends(base_url)]


def body_of(cls: type[B], entrance: Entrance = caller) -> Callable[[Request, Caller], Awaitable[B]]:
    """Reads the body as JSON whatever its content type says, as the hosted service does.

    Raises BadRequest or InvalidBody. The caller is asked for first: an unknown one learns nothing.
    """

    async def read(request: Request, _: Annotated[Caller, Depends(entrance)]) -> B:
        try:
            return cls.model_validate(await _json(await request.body()))
        except ValidationError as error:
            raise _invalid(error) from None
        except (ValueError, RecursionError):
            raise BadRequest("The body is not JSON.") from None

    return read


def schema_of(cls: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI part that tells of a body read by `body_of`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": cls.model_json_schema()}}}}


async def _json(body: bytes) -> Any:
    """A body with an image in it takes a tenth of a second to parse: off the event loop with it."""
    return await asyncio.to_thread(json.loads, body) if len(body) > LARGE_BODY_BYTES else json.loads(body)


def _invalid(error: ValidationError) -> InvalidBody:
    issues = [
        {"path": ".".join(str(part) for part in each["loc"]), "message": each["msg"]}
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    text = "; ".join(f"{issue['path'] or 'body'}: {issue['message']}" for issue in issues)
    return InvalidBody(text, issues=issues)


DAYS = 30
LONGEST_DAYS = 366

Form = Annotated[Literal["json", "csv"], Query(alias="format")]


async def asked_period(
    services: ServicesDep,
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
) -> Period:
    """`from` and `to`, days in UTC and both included; by default the last thirty. Raises InvalidBody."""
    last = last or datetime.fromtimestamp(services.clock(), UTC).date()
    first = first or last - timedelta(days=DAYS - 1)
    if not timedelta(0) <= last - first < timedelta(days=LONGEST_DAYS):
        raise invalid_field("from", f"from one day to {LONGEST_DAYS} days")
    return Period(first, last)


Asked = Annotated[Period, Depends(asked_period)]

Limit = Annotated[int, Query(ge=1, le=200)]

Name = Annotated[str, Field(min_length=1, max_length=200)]


class StrictBody(BaseModel):
    """What an admin sends: nothing unknown is let through, lest a misspelt limit be no limit."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


async def audited(services: Services, caller: users.Caller, do: Any, *values: Any, **options: Any) -> Any:
    """One act in one transaction, with its line in the audit log."""

    def in_one_transaction() -> Any:
        with services.database.atomic() as db:
            return do(AdminContext(db, Actor.of(caller), services.clock()), *values, **options)

    return await services.database.call(in_one_transaction)


async def _note(services: Services, caller: Caller, act: str, subject: str, **detail: Any) -> None:
    def write() -> None:
        with services.database.atomic() as db:
            record(db, Actor.of(caller), act, subject, services.clock(), **detail)

    await services.database.call(write)
