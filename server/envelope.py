"""ASGI around every route: an id for each request, and a bound on its body."""

import secrets

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import TooLarge

MAX_BODY_BYTES = 48 * 2**20
"""A data URL of the largest image allowed (32 MiB) is 43 MiB of base64."""


class RequestId:
    """Puts `request_id` into the scope and `X-Request-Id` into every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["request_id"] = f"req_{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = scope["request_id"]
            await send(message)

        return await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Raises TooLarge out of the read that passes the limit, whatever Content-Length said."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        taken = 0

        async def receive_limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                raise TooLarge(f"The body is over the limit of {MAX_BODY_BYTES // 2**20} MiB.")
            return message

        return await self.app(scope, receive_limited, send)
