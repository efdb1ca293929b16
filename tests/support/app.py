"""The app in-process, over workers that finish every job at once: for tests of authorization, limits and credits."""

import asyncio
import base64
import functools
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from pipelines.catalog.reader import load_catalog
from pipelines.weights.pull import pull
from server import services
from server.accounts import keys, ledger, users
from server.app import create_app
from server.db.database import Database
from server.jobs.store import JobStore
from server.services import Services
from server.settings import Settings
from server.workers.devices import DeviceSpec
from server.workers.protocol import Cancel, Cancelled, Failed, Ready, Run, Succeeded


class Clock:
    """A clock that only tests advance."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


GENERATE = "/api/image/fal/generate"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000 1f15c4890000000d49444154789c6360606060000000"
    "0500010d0a2db40000000049454e44ae426082".replace(" ", "")
)
NOW = 1_790_000_000.0
CPU = DeviceSpec("cpu", "CPU", "cpu", 8 * 2**30, 6 * 2**30)
MODEL = """
[models.{name}]
name = "{name}"
kind = "{kind}"
family = "tests.families.scripted"
workflows = ["{workflow}"]
credits = {{ base = {price} }}
licence = "none"
sizes = {{ "1:1" = [64, 64] }}
defaults = {{ num_inference_steps = 2 }}
weights = {{ source = "path", path = "{path}" }}
"""
DEFAULTS = """
[default_models]
upscale = "larger"
remove-bg = "cut"
"""


class InstantWorker:
    """A supervisor whose worker ends a job as its prompt says: `fail CODE`, `hold` until `release`, else at once.

    A job `only WAY` runs out of memory in every other way.
    """

    def __init__(self, device: DeviceSpec, families: Any, on_event: Callable[[str, Any], None]) -> None:
        self.device, self.on_event = device, on_event
        self.held: list[Run] = []
        self.holds = True

    def start(self) -> None:
        self.emit(Ready())

    def send(self, command: Any) -> None:
        match command:
            case Run(params={"prompt": "hold"}) if self.holds:
                self.held.append(command)
            case Run():
                self.end(command)
            case Cancel(job_id):
                self.held = [run for run in self.held if run.job_id != job_id]
                self.emit(Cancelled(job_id))

    def release(self, *, holds: bool = False) -> None:
        """Finishes the held jobs; with `holds`, the next one is held again."""
        self.holds = holds
        while self.held:
            self.end(self.held.pop(0))

    def end(self, run: Run) -> None:
        word, _, code = str(run.params.get("prompt", "")).partition(" ")
        if word == "fail":
            return self.emit(Failed(run.job_id, code, "It broke."))
        if word == "only" and run.way.name != code:
            return self.emit(Failed(run.job_id, "OUT_OF_MEMORY", "The device ran out of memory."))
        run.output.write_bytes(PNG)
        return self.emit(Succeeded(run.job_id, 64, 64, 0.5))

    def emit(self, event: Any) -> None:
        asyncio.get_running_loop().call_soon(self.on_event, self.device.id, event)

    async def stop(self, patience_s: float) -> None:
        pass


@dataclass
class ApiUser:
    """A user and their HTTP client: `ask` posts JSON, `read` gets it."""

    id: str
    key: str
    client: httpx.AsyncClient

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.request(method, path, json=body, headers=sent)

    async def ask(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return await self.call("POST", path, body, **headers)

    async def make(self, prompt: str = "work", model: str = "plain", **headers: str) -> httpx.Response:
        return await self.ask(GENERATE, {"prompt": prompt, "model": model}, **headers)

    async def read(self, path: str) -> Any:
        return (await self.client.get(path)).raise_for_status().json()

    async def balance(self) -> int:
        return (await self.read("/api/credits"))["balance"]


class InProcessApp:
    """An app served in-process, and its users."""

    def __init__(self, made: Services, clock: Clock) -> None:
        self.services, self.clock = made, clock
        self.store = JobStore(Database(made.settings.database))  # of our own: the server's is its thread's
        self.db = self.store.db
        self.asgi = create_app(made)
        self.clients: list[httpx.AsyncClient] = []

    @property
    def workers(self) -> list[InstantWorker]:
        return [worker.supervisor for worker in self.services.dispatcher.state.workers.values()]  # type: ignore[misc]

    def release(self, *, holds: bool = False) -> None:
        for worker in self.workers:
            worker.release(holds=holds)

    def client(self, key: str = "", base_url: str = "http://127.0.0.1:8000") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.AsyncClient(transport=httpx.ASGITransport(self.asgi), base_url=base_url, headers=headers)
        self.clients.append(client)
        return client

    def create_user(self, name: str = "ada", *, plan: str = "studio", credits: int = 0, role: str = "user") -> ApiUser:
        with self.store.database.atomic() as db:
            user_id = users.create_user(db, name, f"{name}@example.com", self.clock(), plan=plan, role=role)
            if credits:
                ledger.grant(db, user_id, credits, "test", self.clock())
        return self.add_key(user_id)

    def add_key(self, user_id: str, **options: Any) -> ApiUser:
        with self.store.database.atomic() as db:
            _, key = keys.create_key(db, user_id, "test", self.clock(), **options)
        return ApiUser(user_id, key, self.client(key))

    def owner(self) -> ApiUser:
        return self.add_key(users.user_by_email(self.db, "owner@localhost"))

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        return list(self.db.query(sql, values))

    async def settle(self) -> None:
        """Waits until the dispatcher has handled all messages."""
        for _ in range(20):
            await asyncio.sleep(0)
            await self.services.jobs.database.call(lambda: None)


def install_test_models(folder: Path) -> Settings:
    """Installs two image models, an upscaler and a background remover, with weights of a few bytes."""
    part = folder / "part.safetensors"
    part.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.ones((4, 4), np.float32)}, part)
    models = [("plain", "image", "text-to-image", 1), ("dear", "image", "text-to-image", 4)]
    models += [("larger", "upscale", "upscale", 1), ("cut", "remove-bg", "remove-bg", 1)]
    texts = [
        MODEL.format(name=name, kind=kind, workflow=flow, price=price, path=part) for name, kind, flow, price in models
    ]
    toml = folder / "weights.toml"
    toml.write_text(DEFAULTS + "".join(texts))
    settings = Settings(data=folder / "data", weights_toml=toml)
    for model in load_catalog(toml).models.values():
        pull(model, settings.weights)
    return settings


@asynccontextmanager
async def serve_app(
    settings: Settings, clock: Clock | None = None, device: DeviceSpec = CPU
) -> AsyncIterator[InProcessApp]:
    """Serve `settings` in this event loop until the block ends."""
    clock = clock or Clock()
    made = services.build_services(settings, [device], clock, spawn=InstantWorker)  # type: ignore[arg-type]
    app = InProcessApp(made, clock)
    await made.start()
    await app.settle()
    try:
        yield app
    finally:
        for client in app.clients:
            await client.aclose()
        await made.stop()
        app.store.database.close()


def app_test(**options: Any) -> Callable[[Callable[[InProcessApp], Awaitable[None]]], Callable[[Path], None]]:
    """Decorator: runs a coroutine test against the in-process app. `options` are settings."""

    def wrap(test: Callable[[InProcessApp], Awaitable[None]]) -> Callable[[Path], None]:
        def run(tmp_path: Path) -> None:
            async def run_test() -> None:
                settings = install_test_models(tmp_path)
                async with serve_app(Settings(**{**vars(settings), **options})) as app:
                    await test(app)

            asyncio.run(run_test())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return wrap


@functools.cache
def picture() -> str:
    """A small PNG, as a data URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
