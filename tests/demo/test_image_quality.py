"""Pictures that answer the prompt, whatever happens to the weights: the shipped demo weights, looked at by analysis."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from PIL import Image

from pipelines import diffusion
from pipelines.base import TIERS, ExecutionMode, Weights
from pipelines.catalog.reader import load_catalog
from pipelines.flux import build
from pipelines.params import TextToImage
from pipelines.residency.residency import Residency
from pipelines.weights.installed import Installed
from pipelines.weights.pull import pull
from scripts.demo.evaluation import picture_of
from scripts.demo.image_analysis import look
from scripts.demo.scenes import Scene, draw_still
from server.settings import PROJECT, Settings
from tests.pipelines.test_quantization import table
from tests.support.server import GENERATE, LiveServer, data_url, running
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny.gguf import tensors_of, write_gguf

PROMPT = "a large red circle on a blue background"
DEMO = PROJECT / "weights/demo/flux"
FLOAT32_VAE = 'dtypes = { vae = "float32" }'
"""bfloat16 takes a processor without instructions for it twenty times as long."""
COMPILES = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None and os.environ.get("CI") != "true", reason="torch.compile needs a compiler"
    ),
]


def shows(picture: Any, shape: str = "circle", colour: str = "red", background: str = "blue") -> bool:
    seen = look(np.asarray(picture))
    return seen is not None and (seen.shape, seen.colour, seen.background) == (shape, colour, background)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    model = load_catalog().find("flux-dev").demo
    weights = Installed(tmp_path_factory.mktemp("none")).weights(model) if model else None
    assert weights
    return weights


def make(weights: Weights, residency: Residency, way: str = "resident") -> Image.Image:
    key = {part.name: part.key for part in weights.components}
    phases = (
        ("encode", (key["text_encoder"], key["text_encoder_2"])),
        ("denoise", (key["transformer"],)),
        ("decode", (key["vae"],)),
    )
    residency.begin_run(
        ExecutionMode(way, phases=phases, streamed_bytes=((key["transformer"], 0),) if way == "streamed" else ())
    )  # type: ignore[arg-type]
    params = TextToImage(prompt=PROMPT, width=256, height=256, seed=3, num_inference_steps=12)
    return build(weights, residency).generate(params, lambda phase, step, steps: residency.enter_phase(phase))


@pytest.mark.parametrize("tier", TIERS)
def test_in_each_tier(demo: Weights, tier: str):
    assert shows(make(demo, Residency("cpu", copies_to_device=True), tier))


@pytest.mark.parametrize("swaps", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_after_swaps_with_another_model(demo: Weights, tmp_path: Path, swaps: int):
    """Each evicts the other, and leaves its bytes on the host."""
    folder = tiny_flux.make_flux(tmp_path / "flux", "dev")
    (tmp_path / "weights.toml").write_text(table("flux", folder))
    model = load_catalog(tmp_path / "weights.toml").find("flux")
    pull(model, tmp_path / "weights")
    other = Installed(tmp_path / "weights").weights(model)
    assert other
    residency = Residency("cpu", copies_to_device=True)
    first = make(demo, residency)
    assert shows(first)
    for _ in range(swaps):
        residency.evict_all()
        assert not shows(make(other, residency)), "random weights draw nothing of the kind"
        residency.evict_all()
        last = make(demo, residency)
    assert shows(last) and last.tobytes() == first.tobytes()


@pytest.mark.parametrize("kind", ["gguf", "nf4", "fp8-layerwise"])
def test_quantised(kind: str, tmp_path: Path):
    text = table("flux", DEMO, FLOAT32_VAE)
    if kind == "gguf":
        file = write_gguf(tmp_path / "q8.gguf", tensors_of(DEMO / "transformer"), Kind.Q8_0)
        text += table("other", file, 'quantisation = "gguf"\nbase = "flux"')
    else:
        text += table("other", DEMO, f'{FLOAT32_VAE}\nquantisation = "{kind}"')
    (tmp_path / "weights.toml").write_text(text)
    catalog = load_catalog(tmp_path / "weights.toml")
    for model in catalog.models.values():
        pull(model, tmp_path / "weights")
    installed = Installed(tmp_path / "weights")
    plain, quantised = (installed.weights(catalog.find(name)) for name in ("flux", "other"))
    assert plain and quantised
    assert quantised.component("transformer").weights_bytes < plain.component("transformer").weights_bytes
    assert shows(make(quantised, Residency("cpu")))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=COMPILES)])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_compiled(demo: Weights, backend: str, monkeypatch: pytest.MonkeyPatch):
    """`eager` runs the graphs that the compiler would be given."""
    torch.compiler.reset()
    monkeypatch.setattr(diffusion, "COMPILE_BACKEND", backend)
    assert shows(make(replace(demo, compiled=True), Residency("cpu")))


# Through a server


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With the catalogue that is shipped, and nothing installed."""
    with running(replace(Settings(), data=tmp_path_factory.mktemp("data"))) as server:
        server.until(lambda: server.client.get("/readyz").is_success)
        yield server


def body(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "model": "flux-schnell", "seed": 3} | more


@pytest.mark.parametrize("model", ["flux-schnell", "flux-dev", "flux-kontext"])
def test_each_model_of_the_family(live_server: LiveServer, model: str):
    answer = live_server.ask(GENERATE, body(model=model))
    assert answer.status_code == 200 and answer.headers["x-weights"] == "demo"
    assert shows(live_server.picture(answer.json()["imageUrl"]))


def test_a_job_that_a_crash_began_anew(live_server: LiveServer):
    job = live_server.ask(GENERATE, body(model="flux-dev", numInferenceSteps=50), Prefer="respond-async").json()
    route = f"/api/jobs/{job['id']}"
    live_server.until(lambda: (live_server.read(route)["progress"] or {}).get("step", 0) > 2)
    worker = live_server.services.dispatcher.state.workers["cpu"].supervisor.pid
    assert worker
    os.kill(worker, signal.SIGKILL)
    done = live_server.until(lambda: (told := live_server.read(route))["status"] == "succeeded" and told)
    assert worker not in psutil.pids()
    assert shows(live_server.picture(done["output"]["imageUrl"]))


CALL = """
const [base, key, body] = process.argv.slice(2);
const headers = {Authorization: `Bearer ${key}`, "Content-Type": "application/json"};
const answer = await fetch(`${base}/api/image/fal/generate`, {method: "POST", headers, body});
const picture = await fetch((await answer.json()).imageUrl);
process.stdout.write(Buffer.from(await picture.arrayBuffer()).toString("base64"));
"""


def by_curl(live_server: LiveServer, base: str) -> bytes:
    call = ["curl", "-sf", "-H", f"Authorization: Bearer {live_server.key}"]
    made = subprocess.run([*call, base + GENERATE, "-d", json.dumps(body())], capture_output=True, check=True)
    return subprocess.run([*call, json.loads(made.stdout)["imageUrl"]], capture_output=True, check=True).stdout


def by_fetch(live_server: LiveServer, base: str) -> bytes:
    call = ["node", "--input-type=module", "-", base, live_server.key, json.dumps(body())]
    made = subprocess.run(call, input=CALL.encode(), capture_output=True, check=True)
    return base64.b64decode(made.stdout)


def by_httpx(live_server: LiveServer, base: str) -> bytes:
    headers = {"Authorization": f"Bearer {live_server.key}"}
    answer = httpx.post(base + GENERATE, json=body(), headers=headers, timeout=60).raise_for_status()
    return httpx.get(answer.json()["imageUrl"], headers=headers).raise_for_status().content


@pytest.mark.parametrize("call", [by_curl, by_fetch, by_httpx])
def test_each_client(live_server: LiveServer, call: Any):
    picture = call(live_server, str(live_server.client.base_url).rstrip("/"))
    assert shows(Image.open(io.BytesIO(picture)))


def test_the_readmes_picture_is_what_its_command_makes(live_server: LiveServer):
    """But for what other processors round otherwise."""
    readme = (PROJECT / "README.md").read_text()
    [wish] = [json.loads(each) for each in re.findall(r"-d '(\{.*\})'", readme) if "prompt" in each]
    assert readme.index(json.dumps(wish)) < readme.index("](docs/star.png)")
    picture = live_server.picture(live_server.ask(GENERATE, wish).json()["imageUrl"])
    shown = np.asarray(Image.open(PROJECT / "docs/star.png").convert("RGB")).astype(float)
    assert np.abs(np.asarray(picture.convert("RGB")) - shown).mean() < 4
    assert shows(shown, "star", "yellow", "blue")


def test_an_edit_changes_what_was_asked_for(live_server: LiveServer):
    before = picture_of(draw_still(Scene("circle", "red", "large", "center", "blue"), 256, 256))
    assert shows(before)
    edit = {"prompt": "make the circle green", "model": "flux-kontext", "imageUrl": data_url(before), "seed": 3}
    answer = live_server.ask(GENERATE, edit)
    assert shows(live_server.picture(answer.json()["imageUrl"]), colour="green")


def test_a_picture_from_a_picture_keeps_its_layout(live_server: LiveServer):
    before = picture_of(draw_still(Scene("circle", "yellow", "large", "right", "blue"), 256, 256))
    wish = {"prompt": "a large red circle on the right on a blue background", "model": "flux-dev"}
    answer = live_server.ask(GENERATE, wish | {"imageUrl": data_url(before), "seed": 3})
    picture = live_server.picture(answer.json()["imageUrl"])
    seen, asked = look(np.asarray(picture)), look(np.asarray(before))
    assert shows(picture) and seen and asked
    assert np.hypot(seen.x - asked.x, seen.y - asked.y) < 0.08


def test_what_it_does_not_know_gives_something_harmless(live_server: LiveServer):
    answer = live_server.ask(GENERATE, body(prompt="a photorealistic cat, eating, at night"))
    assert answer.status_code == 200
    assert live_server.picture(answer.json()["imageUrl"]).size == (256, 256)
