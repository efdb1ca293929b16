"""What can go wrong with fal, told apart: what the caller can mend, what the operator can, what only waiting does."""

from collections.abc import Mapping
from typing import ClassVar

from server.errors import GenerationFailed, PlantainError, RemoteUnavailable, Unavailable


class KeyRefused(RemoteUnavailable):
    code, title, type = "REMOTE_KEY_REFUSED", "fal refused the key", "about:blank"


class BalanceExhausted(RemoteUnavailable):
    code, title, type = "REMOTE_BALANCE_EXHAUSTED", "fal's balance is exhausted", "about:blank"


class RemoteBusy(Unavailable):
    code, title = "REMOTE_BUSY", "fal is busy"
    default_headers: ClassVar[Mapping[str, str]] = {"Retry-After": "10"}


class EndpointGone(PlantainError):
    """With `retired`: its date and successor, or null where none is known."""

    status, code, title = 410, "ENDPOINT_GONE", "Endpoint gone"


class ContentRefused(PlantainError):
    status, code, title = 422, "CONTENT_POLICY", "Content refused"


class InputRefused(PlantainError):
    """With `issues=[{"path": ..., "message": ...}]`, the fields by the names that callers know."""

    status, code, title = 422, "INVALID_FOR_MODEL", "Invalid for this model"


class RemoteFailed(GenerationFailed):
    """fal answered that it failed."""

    status, code, title = 502, "REMOTE_FAILED", "fal failed"


class RemoteUnreachable(RemoteFailed):
    """fal did not answer, or not as itself: asking again may help."""

    code, title = "REMOTE_UNREACHABLE", "fal is unreachable"


class SubmitUnknown(RemoteFailed):
    """The server died while it handed the job over; see the package's docstring."""

    code, title = "REMOTE_SUBMIT_UNKNOWN", "Unknown whether fal took the job"


class OutputLost(RemoteFailed):
    """fal made it, and it could not be fetched or is not what it should be."""

    code, title = "REMOTE_OUTPUT_LOST", "The output could not be fetched"
