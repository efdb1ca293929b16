"""fal.ai on loopback: its queue, its storage and its CDN, as the official clients know them, and its failures."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = "key-id:key-secret"
MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "mp4": "video/mp4", "svg": "image/svg+xml"}
LOG = {"message": "denoising:  50%|#####     | 14/28 [00:01<00:01]", "level": "INFO", "source": "USER", "timestamp": ""}


@dataclass
class Submitted:
    """One request in the queue. `state` is fal's word for it."""

    id: str
    endpoint: str
    arguments: dict[str, Any]
    looks: int = 0
    cancelled: bool = False


@dataclass
class Refusal:
    """How often the next call at `where` is refused, and with what."""

    where: str
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class FakeFal:
    """`result` is what every endpoint answers; `hold` keeps jobs in the queue."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.submitted: list[Submitted] = []
        self.cancels: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.media: dict[str, bytes] = {}
        self.result: dict[str, Any] = {}
        self.refusals: list[Refusal] = []
        self.hold = False
        self.cancel_answer = (202, "CANCELLATION_REQUESTED")
        self.accepts = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def anew(self, picture: bytes) -> "FakeFal":
        """As if nothing had been sent yet; every endpoint answers this picture."""
        self.reset()
        self.result = {"images": [{"url": self.serves("made.png", picture)}], "seed": 3}
        return self

    def serves(self, name: str, content: bytes) -> str:
        """A file on the CDN; its URL."""
        self.media[name] = content
        return f"{self.url}/media/{name}"

    def refuse(self, where: str, status: int, body: Any, times: int = 1, **headers: str) -> None:
        self.refusals.append(Refusal(where, status, body, headers, times))

    # The queue

    async def submit(self, request: Request) -> Response:
        if refused := self._refusal(request, "submit"):
            return refused
        job = Submitted(f"req-{len(self.submitted) + 1}", request.path_params["endpoint"], await request.json())
        self.submitted.append(job)
        self.accepts.set()
        await run_sync(self.may_answer.wait)
        return JSONResponse({"status": "IN_QUEUE", "queue_position": 0, **self._urls(job)}, headers=_id(job))

    async def status(self, request: Request) -> Response:
        if refused := self._refusal(request, "status"):
            return refused
        job = self._job(request)
        job.looks += not self.hold
        if job.cancelled:
            ended = {"status": "COMPLETED", "logs": None, "metrics": {}, "error_type": "client_cancelled"}
            return JSONResponse(ended | self._urls(job))
        if job.looks <= 1:
            return JSONResponse({"status": "IN_QUEUE", "queue_position": 2, **self._urls(job)}, 202)
        if job.looks == 2:
            return JSONResponse({"status": "IN_PROGRESS", "logs": [LOG], **self._urls(job)}, 202)
        return JSONResponse(
            {"status": "COMPLETED", "logs": [LOG], "metrics": {"inference_time": 1.5}, **self._urls(job)}
        )

    async def answer(self, request: Request) -> Response:
        job = self._job(request)
        if refused := self._refusal(request, "result"):
            return refused
        if job.cancelled:
            return JSONResponse({"detail": "Request was cancelled", "error_type": "client_cancelled"}, 499)
        if job.looks < 3:
            return JSONResponse({"detail": "Request is still in progress"}, 400)
        return JSONResponse(self.result, headers=_id(job))

    async def cancel(self, request: Request) -> Response:
        if refused := self._refusal(request, "cancel"):
            return refused
        job = self._job(request)
        self.cancels.append(job.id)
        status, word = self.cancel_answer
        job.cancelled = word == "CANCELLATION_REQUESTED"
        self.hold = False
        return JSONResponse({"status": word}, status)

    # Storage and CDN

    async def initiate(self, request: Request) -> Response:
        if refused := self._refusal(request, "upload"):
            return refused
        name = f"{len(self.uploads) + 1}-{(await request.json())['file_name']}"
        self.uploads[name] = b""
        return JSONResponse({"upload_url": f"{self.url}/put/{name}?sig=1", "file_url": f"{self.url}/cdn/{name}"})

    async def put(self, request: Request) -> Response:
        """Whole, or a part of it; the key must not come along."""
        name = request.path_params["name"]
        if "authorization" in request.headers or request.query_params.get("sig") != "1":
            return JSONResponse({"detail": "no"}, 403)
        self.uploads[name] += await request.body()
        number = request.path_params.get("number")
        return JSONResponse({"partNumber": number, "etag": f"etag-{number}"} if number else {})

    async def complete(self, request: Request) -> Response:
        self.parts = (await request.json())["parts"]
        return JSONResponse({})

    async def token(self, request: Request) -> Response:
        answer = {"token": "t", "token_type": "Bearer", "base_url": f"{self.url}/v3"}
        return JSONResponse(answer | {"expires_at": "2099-01-01T00:00:00+00:00"})

    async def upload(self, request: Request) -> Response:
        name = f"{len(self.uploads) + 1}-{request.headers['x-fal-file-name']}"
        self.uploads[name] = await request.body()
        return JSONResponse({"access_url": f"{self.url}/cdn/{name}"})

    async def read(self, request: Request) -> Response:
        if refused := self._refusal(request, "output"):
            return refused
        name = request.path_params["name"]
        content = self.media.get(name, self.uploads.get(name))
        if content is None:
            return Response(status_code=404)
        return Response(content, media_type=MIME_TYPES.get(name.rpartition(".")[2], "application/octet-stream"))

    def _refusal(self, request: Request, where: str) -> Response | None:
        if where not in ("output",) and request.headers.get("authorization") != f"Key {KEY}":
            return JSONResponse({"detail": "Cannot access application. Authentication is required."}, 401)
        for refusal in self.refusals:
            if refusal.where == where and refusal.times:
                refusal.times -= 1
                if isinstance(refusal.body, str):
                    return Response(refusal.body, refusal.status, refusal.headers)
                return JSONResponse(refusal.body, refusal.status, refusal.headers)
        return None

    def _job(self, request: Request) -> Submitted:
        return next(job for job in self.submitted if job.id == request.path_params["id"])

    def _urls(self, job: Submitted) -> dict[str, str]:
        base = f"{self.url}/queue/{'/'.join(job.endpoint.split('/')[:2])}/requests/{job.id}"
        urls = {"response_url": base, "status_url": f"{base}/status", "cancel_url": f"{base}/cancel"}
        return {"request_id": job.id, **urls}

    @contextlib.contextmanager
    def running(self) -> Iterator["FakeFal"]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(self._app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield self
        finally:
            self.may_answer.set()
            server.should_exit = True
            thread.join()
            listener.close()

    def _app(self) -> Starlette:
        one = "/queue/{owner}/{alias}/requests/{id}"
        return Starlette(
            routes=[
                Route(f"{one}/status", self.status),
                Route(f"{one}/cancel", self.cancel, methods=["PUT"]),
                Route(one, self.answer),
                Route("/queue/{endpoint:path}", self.submit, methods=["POST"]),
                Route("/rest/storage/upload/initiate", self.initiate, methods=["POST"]),
                Route("/rest/storage/upload/initiate-multipart", self.initiate, methods=["POST"]),
                Route("/rest/storage/auth/token", self.token, methods=["POST"]),
                Route("/put/{name}/complete", self.complete, methods=["POST"]),
                Route("/put/{name}/{number:int}", self.put, methods=["PUT"]),
                Route("/put/{name}", self.put, methods=["PUT"]),
                Route("/v3/files/upload", self.upload, methods=["POST"]),
                Route("/media/{name}", self.read),
                Route("/cdn/{name}", self.read),
            ]
        )


def _id(job: Submitted) -> dict[str, str]:
    return {"x-fal-request-id": job.id}


def wait_for(holds: Any, patience_s: float = 20.0) -> Any:
    """What another thread brings about."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.002)
    raise AssertionError(f"still not so after {patience_s} s")
