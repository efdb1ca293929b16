"""CORS: pages of the origins that the operator trusts may call, with their cookies, and read the answers' headers."""
# FROM server.envelope: ASGI around every route: an id for each request, and a bound on its body.

import secrets

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.origins import Origins
from server.errors import TooLarge

MAX_BODY_BYTES = 48 * 2**20
"""A data URL of the largest image allowed (32 MiB) is 43 MiB of base64."""
MAX_UPLOAD_BYTES = 200 * 2**20
"""A video is uploaded as it is, and goes to disk piece by piece."""
UPLOADS = "/api/uploads"


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


class ResponseHeaders:
    """Writes what `add_header` was given onto the answer, also onto an error's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                late = scope.get("late_headers", [])
                message = {**message, "headers": [*message.get("headers", []), *late]}
            await send(message)

        return await self.app(scope, receive, send_with_headers)


def add_header(request: HTTPConnection, name: str, value: str) -> None:
    """For what is known long before there is an answer, such as a session's new cookie."""
    late = request.scope.setdefault("late_headers", [])
    late.append((name.lower().encode("latin-1"), value.encode("latin-1")))


def set_header(request: HTTPConnection, name: str, value: str) -> None:
    """As `add_header`, in place of what was given for this name before."""
    late = request.scope.setdefault("late_headers", [])
    late[:] = [header for header in late if header[0] != name.lower().encode("latin-1")]
    add_header(request, name, value)


class BodyLimit:
    """Raises TooLarge out of the read that passes the limit, whatever Content-Length said.

    FastAPI's own `max_body_size` answers in plain text from outside our handlers; every error here is in the envelope.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0
        most = MAX_UPLOAD_BYTES if scope.get("path") == UPLOADS else MAX_BODY_BYTES

        async def receive_limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise TooLarge(f"The body is over the limit of {most // 2**20} MiB.")
            return message

        await self.app(scope, receive_limited, send)


READABLE = (
    "Location", "Retry-After", "Idempotent-Replayed", "Preference-Applied", "RateLimit", "RateLimit-Policy",
    "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-Credits-Charged", "X-Credits-Remaining",
    "X-Ignored-Fields", "X-Job-Id", "X-Request-Id", "X-Served-By", "X-Weights", "set-auth-token",
)  # fmt: skip


class Cors(CORSMiddleware):
    """Exact origins, never `*`: credentials go along."""

    def __init__(self, app: ASGIApp, trusted: tuple[str, ...]) -> None:
        super().__init__(app, allow_methods=["*"], allow_headers=["*"], allow_credentials=True, expose_headers=READABLE)
        self.origins = Origins(frozenset(), trusted)

    def is_allowed_origin(self, origin: str) -> bool:
        return self.origins.trusts(origin)
