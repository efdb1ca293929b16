"""A server on a real socket with a real worker process, tiny Flux weights and the real starter weights."""

import asyncio
import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from PIL import Image

from pipelines.catalog.reader import load_catalog
from pipelines.weights.pull import pull
from server import services
from server.accounts import users
from server.app import create_app
from server.services import Services
from server.settings import PROJECT, Settings
from server.workers.devices import DeviceSpec
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import lora as tiny_lora

GENERATE = "/api/image/fal/generate"
CPU = DeviceSpec("cpu", "CPU", "cpu", 8 * 2**30, 6 * 2**30)
PATIENCE_S = 240.0

CATALOG = """
[default_models]
upscale = "upscaler"
remove-bg = "u2netp"

[families.flux]
dtype = "bfloat16"
size_multiple = 16
working = { fixed_bytes = 1000000, bytes_per_pixel = 2156 }
sizes = { "1:1" = [64, 64], "16:9" = [96, 48], "9:16" = [48, 96] }

[models.wayward]
name = "Wayward"
kind = "image"
family = "tests.families.scripted"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "none"
sizes = { "1:1" = [64, 64] }
size_multiple = 16
defaults = { num_inference_steps = 2 }
weights = { source = "path", path = "PART" }

[models.upscaler]
name = "Upscaler"
kind = "upscale"
family = "realesrgan"
workflows = ["upscale"]
credits = { base = 1 }
licence = "BSD-3-Clause"
weights = { source = "path", path = "UPSCALER" }

[models.u2netp]
name = "U2-Net P"
kind = "remove-bg"
family = "rembg"
workflows = ["remove-bg"]
credits = { base = 1 }
licence = "Apache-2.0"
weights = { source = "path", path = "U2NETP" }

[models.huge]
name = "Huge"
kind = "image"
family = "tests.families.scripted"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "none"
sizes = { "1:1" = [64, 64] }
defaults = { num_inference_steps = 2 }
working = { fixed_bytes = 99000000000 }
weights = { source = "path", path = "PART" }

[models."sora-2"]
name = "Sora 2"
kind = "video"
workflows = ["text-to-video"]
credits = { base = 4, per_second = 3 }
licence = "proprietary"
remote = { text-to-video = "fal-ai/sora-2/text-to-video" }

[models.wan]
name = "Wan"
kind = "video"
family = "wan"
workflows = ["text-to-video"]
credits = { base = 4 }
licence = "Apache-2.0"
weights = { source = "hf", repo = "nobody/nothing" }
"""

FLUX = """
[models.flux-{kind}]
name = "Flux {kind}"
kind = "image"
family = "flux"
workflows = {workflows}
credits = {{ base = 2 }}
licence = "Apache-2.0"
aliases = ["flux-1-{kind}"]
defaults = {defaults}
weights = {{ source = "path", path = "{path}" }}
"""

LORAS = """
[models.flux-dev.loras.sketch]
source = "path"
path = "LORA"

[models.flux-dev.loras.elsewhere]
source = "hf"
repo = "nobody/nothing"
files = ["elsewhere.safetensors"]
"""


@dataclass
class LiveServer:
    """A running server. `ask` posts JSON with the owner's key and returns the response."""

    services: Services
    client: httpx.Client
    key: str

    def ask(self, route: str, body: Any = None, **headers: str) -> httpx.Response:
        return self.client.post(
            route, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    def read(self, route: str) -> Any:
        return self.client.get(route).raise_for_status().json()

    def picture(self, url: str) -> Image.Image:
        image = Image.open(io.BytesIO(self.client.get(url).raise_for_status().content))
        image.load()
        return image

    def balance(self) -> int:
        return self.read("/api/credits")["balance"]

    def file_names(self) -> set[str]:
        return {path.name for path in self.services.files.root.iterdir()}

    def until(self, holds: Callable[[], Any]) -> Any:
        """Waits until a condition of another process holds, and returns its value."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if found := holds():
                return found
            time.sleep(0.02)
        raise AssertionError(f"condition not met after {PATIENCE_S} s")


def install_test_models(folder: Path) -> Settings:
    """Creates the test catalogue and a data folder with all of its installable models."""
    weights = folder / "made"
    weights.mkdir(parents=True)
    tiny_flux.make_all(weights)
    part = weights / "part.safetensors"
    part.write_bytes(tiny_safetensors())
    text = CATALOG.replace("PART", str(part)).replace("UPSCALER", str(tiny_upscaler(weights)))
    text = text.replace("U2NETP", str(PROJECT / "data/weights/u2netp/u2netp.onnx"))
    for kind, workflows, defaults in (
        (
            "dev",
            ["text-to-image", "image-to-image"],
            "{ num_inference_steps = 3, guidance_scale = 3.5, strength = 0.75 }",
        ),
        ("schnell", ["text-to-image", "image-to-image"], "{ num_inference_steps = 2, strength = 0.75 }"),
        (
            "kontext",
            ["text-to-image", "image-to-image", "style-transfer"],
            "{ num_inference_steps = 2, guidance_scale = 2.5 }",
        ),
    ):
        text += FLUX.format(kind=kind, workflows=workflows, defaults=defaults, path=weights / f"flux-{kind}")
    text += LORAS.replace("LORA", str(tiny_lora.make_flux_lora(weights / "sketch.safetensors", seed=1)))
    toml = folder / "weights.toml"
    toml.write_text(text)
    settings = Settings(data=folder / "data", weights_toml=toml)
    for model in load_catalog(toml).with_loras.values():
        if model.weights and model.weights.kind == "path":
            pull(model, settings.weights)
    return settings


def tiny_safetensors() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"weight": torch.ones(4, 4)})


def tiny_upscaler(folder: Path) -> Path:
    """A real Real-ESRGAN compact network with few features."""
    import torch
    from safetensors.torch import save_file
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    torch.manual_seed(0)
    network = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4)
    path = folder / "upscaler.safetensors"
    save_file(network.state_dict(), path)
    return path


@contextlib.contextmanager
def running(settings: Settings, devices: list[DeviceSpec] | None = None) -> Iterator[LiveServer]:
    """Serve `settings` from a thread until the block ends."""
    made = services.build_services(settings, [CPU] if devices is None else devices)
    key = made.first_key or a_key(made)
    with serving(made) as address, httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield LiveServer(made, client, key)


@contextlib.contextmanager
def serving(made: Services) -> Iterator[str]:
    """The app on a free port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(create_app(made), log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def a_key(made: Services) -> str:
    from server.accounts import keys

    user = users.user_by_email(made.database.db, "owner@localhost")
    return keys.create_key(made.database.db, user, "test", time.time())[1]


def data_url(image: Image.Image, kind: str = "png") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
