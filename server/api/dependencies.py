"""FastAPI dependencies: the services, the caller, the body, query parameters and this server's address."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from server.accounts import ledger, rate_limits
from server.accounts.admin import Actor, AdminContext
from server.accounts.authorization import ADMIN, CANCEL, GENERATE, READ, Access
from server.accounts.keys import KEY_PREFIX, authorization_token
from server.accounts.rate_limits import RateLimitStatus
from server.accounts.usage import Period
from server.accounts.users import Caller
from server.api import origins
from server.api.auth import cookies
from server.api.middleware import set_header
from server.db.database import Connection
from server.errors import BadRequest, InvalidBody, Unauthorized, invalid_field
from server.services import Services

SAFE_METHODS = frozenset({"GET", "HEAD"})
LARGE_BODY_BYTES = 2**20
"""A larger body is parsed off the event loop: one with an image in it takes 0.1 s."""
DEFAULT_DAYS = 30
MAX_DAYS = 366

B = TypeVar("B", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")


def get_services(request: Request) -> Services:
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(get_services)]


async def current_caller(request: Request, services: ServicesDep) -> Caller:
    """The authorized caller: safe methods need the scope `read`, others `generate`, and are rate limited."""
    return await authorize_request(request, services, READ if request.method in SAFE_METHODS else GENERATE)


async def cancelling_caller(request: Request, services: ServicesDep) -> Caller:
    """For routes that end work: never rate limited."""
    return await authorize_request(request, services, CANCEL)


async def admin_caller(request: Request, services: ServicesDep) -> Caller:
    """An admin by role, or by a key with the scope `admin`."""
    return await authorize_request(request, services, ADMIN)


CurrentCaller = Annotated[Caller, Depends(current_caller)]
CancellingCaller = Annotated[Caller, Depends(cancelling_caller)]
Admin = Annotated[Caller, Depends(admin_caller)]


async def authorize_request(request: Request, services: Services, access: Access) -> Caller:
    """Authenticates and authorizes the caller, and sets the rate limit headers of the response, also of an error.

    Raises Unauthorized and its subclasses, InvalidOrigin, UserBanned, ScopeRequired or RateLimited.
    """
    caller, status = await _authenticate(request, services, access)
    if status:
        set_rate_limit_headers(request, status)
    return caller


def set_rate_limit_headers(request: Request, status: RateLimitStatus) -> None:
    request.state.rate_limit_status = status
    for name, value in status.headers().items():
        set_header(request, name, value)


async def refresh_balance(request: Request, services: Services, user_id: str) -> int:
    """The current balance. Also updates the number of unfinished jobs in the rate limit headers."""
    balance, unfinished = await services.database.run(_balance_and_unfinished, user_id)
    if status := getattr(request.state, "rate_limit_status", None):
        set_rate_limit_headers(request, replace(status, unfinished=unfinished))
    return balance


def base_url(request: Request, services: ServicesDep) -> str:
    """This server's address as the caller sees it, without a trailing slash."""
    return (services.settings.public_url or str(request.base_url)).rstrip("/")


BaseUrl = Annotated[str, Depends(base_url)]
Authorize = Callable[[Request, Services], Awaitable[Caller]]


def body_of(cls: type[B], authorize: Authorize = current_caller) -> Callable[[Request, Caller], Awaitable[B]]:
    """A dependency that parses the body as JSON, whatever its content type, as the hosted service does.

    Raises BadRequest or InvalidBody. The caller is authorized first: an unknown one learns nothing of the schema.
    """

    async def read(request: Request, _: Annotated[Caller, Depends(authorize)]) -> B:
        try:
            return cls.model_validate(await _parse_json(await request.body()))
        except ValidationError as error:
            raise _invalid_body(error) from None
        except (ValueError, RecursionError):
            raise BadRequest("The body is not JSON.") from None

    return read


def schema_of(cls: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a body that is read by `body_of`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": cls.model_json_schema()}}}}


class StrictBody(BaseModel):
    """The body of an admin route. Refuses unknown fields: a misspelt limit must not mean no limit."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


Name = Annotated[str, Field(min_length=1, max_length=200)]
Limit = Annotated[int, Query(ge=1, le=200)]
UsageFormat = Annotated[Literal["json", "csv"], Query(alias="format")]


async def usage_period(
    services: ServicesDep,
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
) -> Period:
    """`from` and `to`, days in UTC, both included; by default the last 30 days. Raises InvalidBody."""
    last = last or datetime.fromtimestamp(services.clock(), UTC).date()
    first = first or last - timedelta(days=DEFAULT_DAYS - 1)
    if not timedelta(0) <= last - first < timedelta(days=MAX_DAYS):
        raise invalid_field("from", f"the period from `from` to `to` must be 1 to {MAX_DAYS} days")
    return Period(first, last)


UsagePeriod = Annotated[Period, Depends(usage_period)]


async def audited(
    services: Services,
    caller: Caller,
    action: Callable[Concatenate[AdminContext, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Runs an admin action, which writes its audit log entry, in one transaction."""

    def run(db: Connection) -> T:
        return action(AdminContext(db, Actor.of(caller), services.clock()), *args, **kwargs)

    return await services.database.transaction(run)


async def _authenticate(request: Request, services: Services, access: Access) -> tuple[Caller, RateLimitStatus | None]:
    authorizer, call, now = services.authorizer, services.database.call, services.clock()
    if services.settings.open:
        origins.check_host(request, services.settings)
        origins.check_call(request, origins.for_pages(request, services.settings))
        return await call(authorizer.authorize_local, access, now)
    token = authorization_token(request.headers.get("authorization", ""))
    if key := token if token.startswith(KEY_PREFIX) else request.headers.get("x-api-key"):
        return await call(authorizer.authorize_key, key, access, now)
    if caller := await cookies.session_of(request, services):
        return await call(authorizer.authorize, caller, access, now)
    if token:  # a key with another prefix, from an imported database
        return await call(authorizer.authorize_key, token, access, now)
    raise Unauthorized("This needs a session or an API key: send Authorization: Bearer bnp_…")


def _balance_and_unfinished(db: Connection, user_id: str) -> tuple[int, int]:
    return ledger.balance(db, user_id), rate_limits.unfinished(db, user_id)


async def _parse_json(body: bytes) -> Any:
    return await asyncio.to_thread(json.loads, body) if len(body) > LARGE_BODY_BYTES else json.loads(body)


def _invalid_body(error: ValidationError) -> InvalidBody:
    issues = [
        {"path": ".".join(str(part) for part in each["loc"]), "message": each["msg"]}
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    text = "; ".join(f"{issue['path'] or 'body'}: {issue['message']}" for issue in issues)
    return InvalidBody(text, issues=issues)
