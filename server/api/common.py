"""What routes share: the services, the caller, the body, and this server's address as the caller sees it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from server.accounts import Caller
from server.api.entrance import let_in
from server.errors import BadRequest, InvalidBody
from server.gate import LOOK, MAKE, RUN_THE_SERVER, STOP
from server.services import Services

B = TypeVar("B", bound=BaseModel)
Entrance = Callable[[Request, Services], Awaitable[Caller]]

READING = frozenset({"GET", "HEAD"})

LARGE_BODY_BYTES = 2**20


def services(request: Request) -> Services:
    return request.app.state.services


Served = Annotated[Services, Depends(services)]


async def caller(request: Request, served: Served) -> Caller:
    """Whoever calls, let in by the gate: to look, or to make something, as the method says."""
    return await let_in(request, served, LOOK if request.method in READING else MAKE)


async def stopper(request: Request, served: Served) -> Caller:
    """For what ends work: never refused for having called too often."""
    return await let_in(request, served, STOP)


async def admin(request: Request, served: Served) -> Caller:
    """By role, or by a key with the scope."""
    return await let_in(request, served, RUN_THE_SERVER)


Authenticated = Annotated[Caller, Depends(caller)]
Stopper = Annotated[Caller, Depends(stopper)]
Admin = Annotated[Caller, Depends(admin)]


def base_url(request: Request, served: Served) -> str:
    """This server's address, without a slash at its end."""
    return (served.settings.public_url or str(request.base_url)).rstrip("/")


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
