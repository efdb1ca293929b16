"""fal's queue over HTTP: submit, look, take the result, cancel. Each method is one request.

The URLs are built here and not taken from answers, so that the key is sent nowhere else. Redirects are not followed.
"""

import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from anyio.to_thread import run_sync

from pipelines.catalog import Model
from pipelines.endpoints import Endpoint
from server.remote.errors import RemoteFailed, RemoteUnreachable
from server.remote.faults import fault

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
            raise fault(response, self.model, self.endpoint)
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
            raise fault(response, self.model, self.endpoint)
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
