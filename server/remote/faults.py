"""What fal's refusals mean. See https://fal.ai/docs/errors for the types that its models tell."""

import re
from collections.abc import Mapping
from typing import Any

import httpx

from pipelines.catalog import Model
from pipelines.endpoints import Endpoint
from server.errors import GenerationTimeout, JobWasCancelled, PlantainError
from server.remote.errors import (
    BalanceExhausted,
    ContentRefused,
    EndpointGone,
    InputRefused,
    KeyRefused,
    RemoteBusy,
    RemoteFailed,
    RemoteUnreachable,
)
from server.remote.mapping import names_of_ours

LOCKED = re.compile(r"locked|balance", re.IGNORECASE)
ENDED = re.compile(r"deprecated|no longer|retired|sunset|shut down", re.IGNORECASE)
FORGOTTEN = re.compile(r"request.* not found", re.IGNORECASE)
THEIR_FAULT = frozenset({"internal_server_error", "downstream_service_error", "downstream_service_unavailable"})


def fault(response: httpx.Response, model: Model, endpoint: Endpoint) -> PlantainError:
    """The error that a refusal of fal's stands for."""
    body = _body(response)
    if body is None and response.status_code >= 500:
        return RemoteUnreachable(f"fal.ai answered {response.status_code}, and not as itself.")
    detail = (body or {}).get("detail", "")
    if isinstance(detail, list):
        return _of_model(detail, model, endpoint)
    text = str(detail or f"status {response.status_code}")
    return _of_platform(response, str((body or {}).get("error_type", "")), text, model, endpoint)


def _of_platform(response: httpx.Response, kind: str, text: str, model: Model, endpoint: Endpoint) -> PlantainError:
    status = response.status_code
    kind = kind or response.headers.get("x-fal-error-type", "")
    if status == 404 and FORGOTTEN.search(text):
        return RemoteFailed("fal.ai no longer knows the job.")
    if status in (404, 410) or (status < 500 and ENDED.search(text)):
        return gone(model, endpoint, text)
    if status in (402, 403) and LOCKED.search(text):
        return BalanceExhausted(f"The operator's account at fal.ai is locked, its balance exhausted: {text}")
    if status in (401, 403):
        return KeyRefused(f"fal.ai refused this server's key: {text}")
    if status == 429:
        return RemoteBusy(f"fal.ai is busy: {text}")
    if status == 499 or kind in ("client_cancelled", "client_disconnected"):
        return JobWasCancelled("The job was cancelled at fal.ai.")
    if status in (408, 504):
        return GenerationTimeout(f"fal.ai ran out of time: {text}")
    if status == 422:
        return InputRefused(f"{model.name} refused the input: {text}", issues=[{"path": "", "message": text}])
    return failed(model, endpoint, f"fal.ai failed with {status}: {text}")


def _of_model(detail: list[Any], model: Model, endpoint: Endpoint) -> PlantainError:
    """A list of issues, as pydantic writes them, with types of fal's own."""
    problems = [each for each in detail if isinstance(each, Mapping)]
    kinds = {str(each.get("type", "")) for each in problems}
    text = "; ".join(str(each.get("msg", "")) for each in problems)
    if "content_policy_violation" in kinds:
        return ContentRefused(f"{model.name} refused the content: {text}")
    if "generation_timeout" in kinds:
        return GenerationTimeout(f"{model.name} ran out of time at fal.ai: {text}")
    if not problems or kinds & THEIR_FAULT:
        return failed(model, endpoint, f"fal.ai failed: {text}")
    names = names_of_ours(endpoint)
    issues = [{"path": _path(each, names), "message": str(each.get("msg", ""))} for each in problems]
    told = "; ".join(f"{issue['path'] or 'input'}: {issue['message']}" for issue in issues)
    return InputRefused(f"{model.name} refused the input: {told}", issues=issues)


def gone(model: Model, endpoint: Endpoint, text: str) -> EndpointGone:
    """With the day that the model's maker ended it, and what they name in its place, where that is known."""
    if model.retired is None or endpoint.serves_any_model:
        told = f"fal.ai no longer has {endpoint.id} for {model.name}: {text}"
        return EndpointGone(told, model=model.id, retired=None)
    told = f"{model.name} was retired on {model.retired.date}."
    if model.retired.successor:
        told += f" Its successor is {model.retired.successor}."
    retired = {"date": model.retired.date, "successor": model.retired.successor}
    return EndpointGone(told, model=model.id, retired=retired)


def failed(model: Model, endpoint: Endpoint, text: str) -> RemoteFailed:
    retired = None if endpoint.serves_any_model else model.retired
    hint = f" {model.name} was to be retired on {retired.date}." if retired else ""
    return RemoteFailed(f"{text}{'' if text.endswith('.') else '.'}{hint}")


def _path(problem: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """`["body", "image_size", "width"]` → `aspectRatio`."""
    places = [str(part) for part in problem.get("loc", ()) if part != "body"]
    return names.get(places[0], ".".join(places)) if places else ""


def _body(response: httpx.Response) -> Mapping[str, Any] | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, Mapping) else None
