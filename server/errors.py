"""The exception tree of errors that a caller sees. `server.api.errors` turns them into JSON."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


class PlantainError(Exception):
    """`message` is for people, `code` for programs; `extra` are further JSON members, in camelCase."""

    status: int = 500
    code: str = "INTERNAL_ERROR"
    title: ClassVar[str] = "Internal error"
    type: ClassVar[str] = "about:blank"
    default_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.message = message
        self.extra = extra
        self.headers: dict[str, str] = {**self.default_headers, **(headers or {})}


# 400: the request cannot be used.


class BadRequest(PlantainError):
    status, code, title = 400, "BAD_REQUEST", "Bad request"


class InvalidBody(BadRequest):
    """With `issues=[{"path": ..., "message": ...}]`."""

    code, title = "VALIDATION_ERROR", "Invalid body"


class UnsupportedDuration(InvalidBody):
    """With `durations`."""

    code, title = "UNSUPPORTED_DURATION", "Unsupported duration"


class UnsupportedWorkflow(BadRequest):
    code, title = "UNSUPPORTED_WORKFLOW", "Unsupported workflow"


class UnsupportedAspectRatio(BadRequest):
    code, title = "UNSUPPORTED_ASPECT_RATIO", "Unsupported aspect ratio"


class UnsupportedResolution(BadRequest):
    """With `resolutions`."""

    code, title = "UNSUPPORTED_RESOLUTION", "Unsupported resolution"


class InvalidMedia(BadRequest):
    code, title = "INVALID_MEDIA", "Invalid media"


class MediaUnreachable(BadRequest):
    code, title = "MEDIA_UNREACHABLE", "Media unreachable"


class AddressRefused(BadRequest):
    code, title = "ADDRESS_REFUSED", "Address refused"


class IdempotencyKeyInvalid(BadRequest):
    code, title = "IDEMPOTENCY_KEY_INVALID", "Invalid Idempotency-Key"


def invalid_field(path: str, message: str, *, cls: type[InvalidBody] = InvalidBody, **extra: Any) -> InvalidBody:
    """An InvalidBody with one issue. `path` is the field's name as callers send it."""
    return cls(f"{path}: {message}", issues=[{"path": path, "message": message}], **extra)


# 401 and 403: authentication and authorization.


class Unauthorized(PlantainError):
    status, code, title = 401, "UNAUTHORIZED", "Unauthorized"
    default_headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": 'Bearer realm="api"'}


class InvalidApiKey(Unauthorized):
    code, title = "INVALID_API_KEY", "Invalid API key"


class KeyDisabled(Unauthorized):
    code, title = "KEY_DISABLED", "Key disabled"


class KeyExpired(Unauthorized):
    code, title = "KEY_EXPIRED", "Key expired"


class Forbidden(PlantainError):
    status, code, title = 403, "FORBIDDEN", "Forbidden"


class InvalidOrigin(Forbidden):
    """A page of another site sent a session cookie."""

    code, title = "INVALID_ORIGIN", "Invalid origin"


class UserBanned(Forbidden):
    code, title = "USER_BANNED", "User banned"


class ScopeRequired(Forbidden):
    """With `scope`, which is required, and `scopes`, which the caller has."""

    code, title = "SCOPE_REQUIRED", "Scope required"


# 402, 404 to 422: the request cannot be served.


class InsufficientCredits(PlantainError):
    """With `required` and `balance`."""

    status, code, title = 402, "INSUFFICIENT_CREDITS", "Insufficient credits"


class NotFound(PlantainError):
    status, code, title = 404, "NOT_FOUND", "Not found"


class ModelNotFound(NotFound):
    """With `model`."""

    code, title = "MODEL_NOT_FOUND", "Model not found"


class MethodNotAllowed(PlantainError):
    """With `headers={"Allow": ...}`."""

    status, code, title = 405, "METHOD_NOT_ALLOWED", "Method not allowed"


class Conflict(PlantainError):
    status, code, title = 409, "CONFLICT", "Conflict"


class JobWasCancelled(Conflict):
    code, title = "CANCELLED", "Cancelled"


class TooLarge(PlantainError):
    status, code, title = 413, "PAYLOAD_TOO_LARGE", "Payload too large"


class UnsupportedMediaType(PlantainError):
    status, code, title = 415, "UNSUPPORTED_MEDIA_TYPE", "Unsupported media type"


class IdempotencyKeyReused(PlantainError):
    status, code, title = 422, "IDEMPOTENCY_KEY_REUSED", "Idempotency-Key reused"


# 429: limits.


class RateLimited(PlantainError):
    """With `headers={"Retry-After": ...}`, `retryAfter` in seconds and `violated-policies`."""

    status, code, title = 429, "RATE_LIMITED", "Too many requests"
    type = QUOTA_EXCEEDED


class ConcurrencyLimit(PlantainError):
    """With `headers={"Retry-After": ...}`, `limit` and `violated-policies`."""

    status, code, title = 429, "CONCURRENCY_LIMIT", "Too many jobs at once"
    type = QUOTA_EXCEEDED


class UsageExceeded(RateLimited):
    """An API key with a fixed number of calls has no calls left."""

    code, title = "USAGE_EXCEEDED", "Usage exceeded"


# 5xx: the server.


class InternalError(PlantainError):
    status, code, title = 500, "INTERNAL_ERROR", "Internal error"


class GenerationFailed(PlantainError):
    """With `refunded` and `balance`."""

    status, code, title = 500, "GENERATION_FAILED", "Generation failed"


class OutOfMemory(GenerationFailed):
    code, title = "OUT_OF_MEMORY", "Out of memory"


class GenerationTimeout(PlantainError):
    """With `refunded` and `balance`."""

    status, code, title = 504, "GENERATION_TIMEOUT", "Generation timed out"


class Unavailable(PlantainError):
    status, code, title = 503, "UNAVAILABLE", "Unavailable"
    type = REDUCED_CAPACITY


class QueueFull(Unavailable):
    """With `headers={"Retry-After": ...}`."""

    code, title = "QUEUE_FULL", "Queue full"


class ModelNotInstalled(Unavailable):
    """The type stays `about:blank`, since retrying does not help. The message names the command that installs it."""

    code, title, type = "MODEL_NOT_INSTALLED", "Model not installed", "about:blank"


class RemoteUnavailable(Unavailable):
    code, title = "REMOTE_UNAVAILABLE", "Remote unavailable"


class DoesNotFit(Unavailable):
    code, title, type = "DOES_NOT_FIT", "Does not fit", "about:blank"


class WeightsUnusable(Unavailable):
    code, title, type = "WEIGHTS_UNUSABLE", "Weights unusable", "about:blank"


class StorageFull(PlantainError):
    status, code, title = 507, "STORAGE_FULL", "Storage full"


def from_code(code: str, default: type[PlantainError]) -> type[PlantainError]:
    """The class of an error code that was stored."""
    return next((cls for cls in subclasses(PlantainError) if cls.code == code), default)


def subclasses(cls: type[PlantainError]) -> Iterator[type[PlantainError]]:
    """All direct and indirect subclasses."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)
