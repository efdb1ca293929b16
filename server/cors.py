"""CORS: pages of the origins that the operator trusts may call, with their cookies, and read the answers' headers."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.auth.origins import Origins

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
