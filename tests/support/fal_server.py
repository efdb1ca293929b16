"""A whole server in-process whose models all run at the fake fal, and what tests send through it."""

import base64
import contextlib
import io
import ipaddress
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from server import services
from server.app import create_app
from server.jobs.job import Job
from server.remote.job import RemoteTimeouts
from server.services import Services
from server.settings import Settings
from tests.support.fal import KEY, FakeFal, wait_for

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
QUICK = RemoteTimeouts(poll_s=0.005, retry_s=0.005, submit_s=20.0, deadline_s=20.0)
ROUTES = {"image": "generate", "upscale": "upscale", "remove-bg": "remove-bg"}


def picture(size: tuple[int, int] = (64, 48), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, format)
    return file.getvalue()


def film(frames: int = 12, fps: int = 8) -> bytes:
    """`frames / fps` seconds of H.264 in MP4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), number * 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def voice(seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(int(seconds * 16000)))
    return file.getvalue()


def data_url(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


PICTURE, FILM, VOICE = picture(), film(), voice()


@dataclass
class RemoteHouse:
    services: Services
    client: TestClient
    fal: FakeFal

    def ask(self, kind: str, body: dict[str, Any], **headers: str) -> httpx2.Response:
        route = "/api/video/fal/generate" if kind == "video" else f"/api/image/fal/{ROUTES[kind]}"
        return self.client.post(route, json=body, headers={name.replace("_", "-"): v for name, v in headers.items()})

    def balance(self) -> int:
        return self.client.get("/api/credits").json()["balance"]

    def entries(self, job_id: str) -> list[str]:
        """The ledger's entries of a job, oldest first."""
        entries = self.client.get("/api/credits/ledger").json()["entries"]
        return [each["kind"] for each in reversed(entries) if each["jobId"] == job_id]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.get(f"/api/jobs/{job_id}").json()

    def row(self, job_id: str) -> Job:
        return self.client.portal.call(self.services.database.call, self.services.jobs.job, job_id)

    def until(self, holds: Callable[[], Any]) -> Any:
        return wait_for(holds)

    def read(self, url: str) -> bytes:
        return self.client.get(url).raise_for_status().content


@dataclass
class Street:
    """Makes servers over one data folder; the next takes up where the last one left off."""

    data: Path
    fal: FakeFal
    key: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def live_server(self, **options: Any) -> Iterator[RemoteHouse]:
        timing = options.pop("timing", QUICK)
        made = services.build_services(self.settings(**options), devices=[], timing=timing)
        self.key = self.key or made.first_key or ""
        client = TestClient(create_app(made), headers={"Authorization": f"Bearer {self.key}"})
        with client:
            yield RemoteHouse(made, client, self.fal)

    def settings(self, **options: Any) -> Settings:
        fal = {"fal_queue_url": f"{self.fal.url}/queue", "fal_rest_url": f"{self.fal.url}/rest", "fal_key": KEY}
        return Settings(
            **{"data": self.data, "demo": False, "allowed_networks": LOOPBACK, **fal, **self.options, **options}
        )
