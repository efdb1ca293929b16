"""ASGI middleware: request ids, late response headers, the body size limit and CORS."""

import secrets

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.origins import Origins
from server.errors import TooLarge

MAX_BODY_BYTES = 48 * 2**20
"""The largest image allowed (32 MiB) is 43 MiB as a base64 data URL."""
MAX_UPLOAD_BYTES = 200 * 2**20
"""For uploads, which are streamed to disk."""
UPLOADS = "/api/uploads"


class RequestId:
    """Puts `request_id` into the scope and `X-Request-Id` into every response."""

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
    """Adds the headers given to `add_header` to the response, also to an error response."""

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
    """Adds a header to the response before there is one, such as the cookie of a renewed session."""
    late = request.scope.setdefault("late_headers", [])
    late.append((name.lower().encode("latin-1"), value.encode("latin-1")))


def set_header(request: HTTPConnection, name: str, value: str) -> None:
    """As `add_header`, replacing earlier values of the same name."""
    late = request.scope.setdefault("late_headers", [])
    late[:] = [header for header in late if header[0] != name.lower().encode("latin-1")]
    add_header(request, name, value)


class BodyLimit:
    """Raises TooLarge from the read that exceeds the limit, whatever Content-Length is.

    FastAPI's own `max_body_size` responds in plain text from outside the error handlers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_bytes = 0
        limit_bytes = MAX_UPLOAD_BYTES if scope.get("path") == UPLOADS else MAX_BODY_BYTES

        async def receive_limited() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > limit_bytes:
                raise TooLarge(f"The body is over the limit of {limit_bytes // 2**20} MiB.")
            return message

        await self.app(scope, receive_limited, send)


EXPOSED_HEADERS = (
    "Location", "Retry-After", "Idempotent-Replayed", "Preference-Applied", "RateLimit", "RateLimit-Policy",
    "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-Credits-Charged", "X-Credits-Remaining",
    "X-Ignored-Fields", "X-Job-Id", "X-Request-Id", "X-Served-By", "X-Weights", "set-auth-token",
)  # fmt: skip


class Cors(CORSMiddleware):
    """CORS for the trusted origins, with credentials. Responds with the exact origin, never `*`."""

    def __init__(self, app: ASGIApp, trusted: tuple[str, ...]) -> None:
        super().__init__(
            app, allow_methods=["*"], allow_headers=["*"], allow_credentials=True, expose_headers=EXPOSED_HEADERS
        )
        self.origins = Origins(frozenset(), trusted)

    def is_allowed_origin(self, origin: str) -> bool:
        return self.origins.trusts(origin)
