"""fal's queue over HTTP: submit, look, take the result, cancel. Each method is one request.

The URLs are built here and not taken from answers, so that the key is sent nowhere else. Redirects are not followed.
"""
# What error responses mean: https://fal.ai/docs/errors lists the types that fal and its models send.

import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from anyio.to_thread import run_sync

from pipelines.catalog.catalog import Model
from pipelines.catalog.endpoints import Endpoint
from server.errors import GenerationTimeout, JobWasCancelled, PlantainError
from server.remote.arguments import caller_field_names
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

LOCKED = re.compile(r"locked|balance", re.IGNORECASE)
ENDED = re.compile(r"deprecated|no longer|retired|sunset|shut down", re.IGNORECASE)
FORGOTTEN = re.compile(r"request.* not found", re.IGNORECASE)
THEIR_FAULT = frozenset({"internal_server_error", "downstream_service_error", "downstream_service_unavailable"})


def error_from_response(response: httpx.Response, model: Model, endpoint: Endpoint) -> PlantainError:
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
        return endpoint_gone(model, endpoint, text)
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
    return remote_failed(model, endpoint, f"fal.ai failed with {status}: {text}")


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
        return remote_failed(model, endpoint, f"fal.ai failed: {text}")
    names = caller_field_names(endpoint)
    issues = [{"path": _path(each, names), "message": str(each.get("msg", ""))} for each in problems]
    told = "; ".join(f"{issue['path'] or 'input'}: {issue['message']}" for issue in issues)
    return InputRefused(f"{model.name} refused the input: {told}", issues=issues)


def endpoint_gone(model: Model, endpoint: Endpoint, text: str) -> EndpointGone:
    """With the day that the model's maker ended it, and what they name in its place, where that is known."""
    if model.retired is None or endpoint.serves_any_model:
        told = f"fal.ai no longer has {endpoint.id} for {model.name}: {text}"
        return EndpointGone(told, model=model.id, retired=None)
    told = f"{model.name} was retired on {model.retired.date}."
    if model.retired.successor:
        told += f" Its successor is {model.retired.successor}."
    retired = {"date": model.retired.date, "successor": model.retired.successor}
    return EndpointGone(told, model=model.id, retired=retired)


def remote_failed(model: Model, endpoint: Endpoint, text: str) -> RemoteFailed:
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


NAMESPACES = ("workflows", "comfy")
STEPS = re.compile(r"\b(\d{1,5})/(\d{1,5})\b")
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
CANCEL_ANSWERS = (200, 202, 400, 404)


@dataclass(frozen=True)
class Connection:
    """Where fal is, and the key. The key is in no repr and no log."""

    queue_url: str
    rest_url: str
    client: httpx.AsyncClient

    @classmethod
    def open(cls, key: str, queue_url: str, rest_url: str, tls: ssl.SSLContext) -> "Connection":
        headers = {"Authorization": f"Key {key}", "User-Agent": "Plantain"}
        client = httpx.AsyncClient(headers=headers, timeout=TIMEOUT, verify=tls)
        return cls(queue_url.rstrip("/"), rest_url.rstrip("/"), client)

    async def ask(self, method: str, url: str, body: Any = None) -> httpx.Response:
        """Raises RemoteUnreachable; its cause tells whether the request can have arrived."""
        content = None if body is None else await run_sync(_encoded, body)  # off the loop: pictures may be in it
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            return await self.client.request(method, url, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise RemoteUnreachable(f"fal.ai could not be reached: {error or type(error).__name__}.") from error


@dataclass(frozen=True)
class Status:
    """`position` is how many requests are before this one; step and steps are what the logs tell last."""

    state: Literal["queued", "running", "done"]
    position: int = 0
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Request:
    """One job's place in fal's queue. What its methods raise is in `server.remote.errors`."""

    connection: Connection
    model: Model
    endpoint: Endpoint
    id: str = ""

    async def submit(self, arguments: Mapping[str, Any]) -> str:
        """Hand it over; returns fal's id for it."""
        response = await self._ask("POST", f"{self.connection.queue_url}/{self.endpoint.id}", arguments)
        request_id = str(self._object(response).get("request_id", ""))
        if not re.fullmatch(r"[\w-]{1,128}", request_id):
            raise RemoteFailed("fal.ai took the job and named no request id.")
        return request_id

    async def status(self) -> Status:
        return read_status(self._object(await self._ask("GET", f"{self._url}/status?logs=1")))

    async def result(self) -> Mapping[str, Any]:
        return self._object(await self._ask("GET", self._url))

    async def cancel(self) -> bool:
        """False if it had ended before: its result is there."""
        response = await self.connection.ask("PUT", f"{self._url}/cancel")
        if response.status_code not in CANCEL_ANSWERS:
            raise error_from_response(response, self.model, self.endpoint)
        return "ALREADY_COMPLETED" not in response.text

    @property
    def _url(self) -> str:
        """A request is known by its application: the endpoint's further path is left out."""
        parts = self.endpoint.id.split("/")
        application = "/".join(parts[: 3 if parts[0] in NAMESPACES else 2])
        return f"{self.connection.queue_url}/{application}/requests/{self.id}"

    async def _ask(self, method: str, url: str, body: Any = None) -> httpx.Response:
        response = await self.connection.ask(method, url, body)
        if not response.is_success:
            raise error_from_response(response, self.model, self.endpoint)
        return response

    def _object(self, response: httpx.Response) -> Mapping[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, Mapping):
            raise RemoteUnreachable("fal.ai answered something that is not its own.")
        return body


def _encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def read_status(body: Mapping[str, Any]) -> Status:
    """An unknown state counts as running: the deadline bounds it."""
    if body.get("status") == "COMPLETED":
        return Status("done")
    if body.get("status") == "IN_QUEUE":
        return Status("queued", position=int(body.get("queue_position") or 0))
    for line in reversed(body.get("logs") or []):
        if found := STEPS.findall(str(line.get("message", ""))):
            step, steps = map(int, found[-1])
            return Status("running", step=step, steps=steps)
    return Status("running")
