"""Each workflow of the local video models: an HTTP call, a real worker process, tiny weights, and the file on disk."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.catalog.reader import load_catalog
from pipelines.weights.pull import pull
from server.files.store import FileStore
from server.settings import Settings
from tests.support.server import LiveServer, data_url, running
from tests.support.tiny import video as tiny_video
from tests.support.video_files import boxes, moov_is_first, probe, write

GENERATE = "/api/video/fal/generate"
PICTURE = Image.linear_gradient("L").resize((160, 96)).convert("RGB")

CATALOG = """
[families.wan]
dtype = "bfloat16"
dtypes = { vae = "float32", image_encoder = "float32" }
size_multiple = 16
frames = { step = 4, max = 33, fps = [16] }
defaults = { num_inference_steps = 2, guidance_scale = 5.0, negative_prompt = "", duration = 0.5, fps = 16 }
working = { fixed_bytes = 1000000, bytes_per_pixel = 28300 }
sizes = { "480p" = { "16:9" = [80, 48], "9:16" = [48, 80] }, "720p" = { "16:9" = [112, 64] } }

[families.ltx]
dtype = "bfloat16"
size_multiple = 32
frames = { step = 8, max = 49, fps = [24, 30] }
defaults = { num_inference_steps = 2, guidance_scale = 3.0, negative_prompt = "bad", duration = 1.0, fps = 24 }
working = { fixed_bytes = 1000000, bytes_per_pixel = 16900 }
sizes = { "480p" = { "16:9" = [128, 64], "1:1" = [64, 64] } }

[models.wan-any]
name = "Wan"
kind = "video"
workflows = ["text-to-video", "image-to-video", "reference-to-video", "extend"]
credits = { base = 2, per_second = 1 }
licence = "Apache-2.0"
variants.text-to-video = ["wan-none", "wan-t2v", "wan-vace"]
variants.image-to-video = ["wan-i2v", "wan-vace"]
variants.reference-to-video = ["wan-vace"]
variants.extend = ["wan-vace", "wan-i2v"]

[models.wan-none]
name = "Wan, not installed"
kind = "video"
family = "wan"
workflows = ["text-to-video"]
credits = { base = 2 }
licence = "Apache-2.0"
defaults.resolution = "480p"
weights = { source = "hf", repo = "nobody/nothing" }
"""

MODEL = """
[models.{name}]
name = "{name}"
kind = "video"
family = "{family}"
workflows = {workflows}
credits = {{ base = 2, per_second = 1 }}
licence = "Apache-2.0"
resolutions = {resolutions}
defaults.resolution = "480p"
weights = {{ source = "path", path = "{path}" }}
"""

ALL = ["text-to-video", "image-to-video", "reference-to-video", "extend"]
WORKFLOWS = {"wan-t2v": ALL[:1], "wan-i2v": [ALL[1], ALL[3]], "wan-vace": ALL, "ltx": ALL}


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("videos")
    made = tiny_video.make_all_video(folder / "made")
    text = CATALOG
    for name, workflows in WORKFLOWS.items():
        resolutions = ["480p", "720p"] if name == "wan-vace" else ["480p"]
        family = name.partition("-")[0]
        text += MODEL.format(
            name=name, family=family, workflows=workflows, resolutions=resolutions, path=made[name].absolute()
        )
    (folder / "weights.toml").write_text(text)
    settings = Settings(data=folder / "data", weights_toml=folder / "weights.toml")
    for model in load_catalog(settings.weights_toml).models.values():
        if model.weights and model.weights.kind == "path":
            pull(model, settings.weights)
    with running(settings) as server:
        server.until(lambda: server.client.get("/readyz").is_success)
        yield server


def video_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def made_by(live_server: LiveServer, body: dict[str, Any]) -> Path:
    """The file on disk, once it was checked that it is what the answer says and what a browser plays."""
    answer = live_server.ask(GENERATE, {"prompt": "a red circle", "seed": 5} | body)
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"videoUrl", "duration"}
    assert "X-Ignored-Fields" not in answer.headers
    path = live_server.services.files.root / answer.json()["videoUrl"].rpartition("/")[2]
    assert live_server.client.get(answer.json()["videoUrl"]).content == path.read_bytes()
    seen = probe(path)
    assert (seen.codec, seen.pixels) == ("h264", "yuv420p")
    assert seen.duration_s == pytest.approx(answer.json()["duration"], abs=1e-3)
    assert moov_is_first(path)
    with Image.open(path.with_suffix(".jpg")) as poster:
        assert poster.size == seen.size
    return path


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of 96 x 64 at 16 a second, with sound: a white box goes right."""
    return write(tmp_path_factory.mktemp("footage") / "box.mp4", boxes(20, 96, 64), 16, sound_s=1.25)


@pytest.mark.parametrize(
    ("body", "size", "frames", "fps"),
    [
        ({"model": "wan-any"}, (80, 48), 9, 16),
        ({"model": "wan-any", "duration": 1}, (80, 48), 17, 16),
        ({"model": "wan-any", "aspectRatio": "9:16"}, (48, 80), 9, 16),
        ({"model": "wan-any", "resolution": "720p"}, (112, 64), 9, 16),
        ({"model": "wan-vace", "resolution": "720p"}, (112, 64), 9, 16),
        ({"model": "ltx"}, (128, 64), 25, 24),
        ({"model": "ltx", "fps": 30, "duration": 1.4, "aspectRatio": "1:1"}, (64, 64), 41, 30),
        ({"model": "wan-any", "imageUrl": data_url(PICTURE)}, (80, 48), 9, 16),
        ({"model": "wan-vace", "imageUrls": [data_url(PICTURE), data_url(PICTURE)]}, (80, 48), 9, 16),
        ({"model": "ltx", "imageUrl": data_url(PICTURE.resize((80, 160)))}, (64, 128), 25, 24),
        ({"model": "wan-any", "workflow": "reference-to-video", "imageUrl": data_url(PICTURE)}, (80, 48), 9, 16),
    ],
)
def test_a_video_is_made(live_server: LiveServer, body: dict[str, Any], size: tuple[int, int], frames: int, fps: int):
    seen = probe(made_by(live_server, body))
    assert (seen.size, seen.frames, seen.fps) == (size, frames, fps)
    assert seen.duration_s == pytest.approx(frames / fps, abs=1e-3)


@pytest.mark.parametrize("model", ["wan-i2v", "wan-vace", "ltx"])
def test_a_video_is_extended(live_server: LiveServer, footage: Path, model: str):
    path = made_by(live_server, {"model": model, "videoUrl": video_url(footage), "duration": 0.5})
    seen = probe(path)
    added = {"wan-i2v": 8, "wan-vace": 8, "ltx": 16}[model]
    assert seen.frames == 20 + added
    assert seen.audio == "aac"
    assert seen.times == sorted(set(seen.times))
    assert frames_apart(path, 19, 20) > 1, "the last frame is not there twice"


@pytest.mark.parametrize("model", ["wan-vace", "ltx"])
def test_a_reference_video_is_followed(live_server: LiveServer, footage: Path, model: str):
    body = {"model": model, "videoUrl": video_url(footage), "workflow": "reference-to-video"}
    assert probe(made_by(live_server, body)).frames == {"wan-vace": 9, "ltx": 25}[model]


def frames_apart(path: Path, one: int, other: int) -> float:
    """Mean difference of two frames, in steps of 8-bit colour."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    return float(np.abs(frames[one] - frames[other]).mean())


def test_an_output_is_extended_again_from_its_own_url(live_server: LiveServer):
    first = live_server.ask(GENERATE, {"prompt": "a", "model": "ltx", "duration": 0.5}).json()
    again = live_server.ask(GENERATE, {"prompt": "a", "model": "ltx", "videoUrl": first["videoUrl"], "duration": 0.5})
    assert again.status_code == 200, again.text
    assert again.json()["duration"] == pytest.approx(first["duration"] + 16 / 24, abs=1e-3)


@pytest.mark.parametrize("model", ["wan-any", "ltx"])
def test_a_seed_is_a_file(live_server: LiveServer, model: str):
    assert made_by(live_server, {"model": model}).read_bytes() == made_by(live_server, {"model": model}).read_bytes()


def test_the_price_is_per_requested_second(live_server: LiveServer):
    answer = live_server.ask(GENERATE, {"prompt": "a", "model": "wan-any", "duration": 2})
    assert answer.headers["X-Credits-Charged"] == "4"


def test_the_job_names_its_variant_and_its_progress_ends_with_writing(live_server: LiveServer):
    answer = live_server.ask(GENERATE, {"prompt": "a", "model": "wan-any"})
    job = live_server.read(f"/api/jobs/{answer.headers['X-Job-Id']}")
    assert (job["model"], job["output"]) == ("wan-t2v", answer.json())


def test_a_running_job_is_cancelled_at_its_next_step_and_leaves_nothing(live_server: LiveServer):
    balance, names = live_server.balance(), live_server.file_names()
    body = {"prompt": "a", "model": "wan-t2v", "numInferenceSteps": 100}
    job = live_server.ask(GENERATE, body, Prefer="respond-async").json()["id"]
    denoising = live_server.until(lambda: at_step(live_server.read(f"/api/jobs/{job}")))
    assert denoising == {"phase": "denoise", "step": denoising["step"], "steps": 100, "secondsLeft": None}
    live_server.client.post(f"/api/jobs/{job}/cancel").raise_for_status()
    ended = live_server.until(lambda: ended_as(live_server.read(f"/api/jobs/{job}")))
    assert (ended, live_server.balance(), live_server.file_names()) == ("cancelled", balance, names)


def at_step(job: dict[str, Any]) -> dict[str, Any] | None:
    progress = job["progress"]
    return progress and progress["phase"] == "denoise" and progress | {"secondsLeft": None}


def ended_as(job: dict[str, Any]) -> str | None:
    return job["status"] if job["finishedAt"] else None


def test_a_poster_stays_and_goes_with_its_video(tmp_path: Path):
    files = FileStore(tmp_path)
    kept, stray = files.new_name(".mp4"), files.new_name(".mp4")
    for name in (kept, stray):
        for path in (files.path(name), files.path(name).with_suffix(".jpg")):
            path.write_bytes(b"x")
    files.sweep({kept}, older_than_s=-1)
    assert {path.stem for path in tmp_path.iterdir()} == {Path(kept).stem}
    files.delete(kept)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"model": "wan-any", "duration": 10}, "UNSUPPORTED_DURATION", "0.31 to 2.06 seconds"),
        ({"model": "wan-any", "fps": 24}, "VALIDATION_ERROR", "16 frames a second"),
        ({"model": "wan-any", "resolution": "4k"}, "UNSUPPORTED_RESOLUTION", "480p, 720p"),
        ({"model": "ltx", "aspectRatio": "21:9"}, "UNSUPPORTED_ASPECT_RATIO", "16:9, 1:1"),
        ({"model": "wan-t2v", "imageUrl": "data:,"}, "UNSUPPORTED_WORKFLOW", "wan-i2v"),
        ({"model": "ltx", "videoUrl": "data:video/mp4;base64,AAAA"}, "INVALID_MEDIA", "MP4"),
        ({"model": "ltx", "workflow": "extend"}, "VALIDATION_ERROR", "extend needs a video"),
    ],
)
def test_unsupported_values_are_refused_with_the_supported_ones(
    live_server: LiveServer, body: dict[str, Any], code: str, words: str
):
    balance = live_server.balance()
    answer = live_server.ask(GENERATE, {"prompt": "a"} | body)
    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text
    assert words in answer.json()["error"]
    assert live_server.balance() == balance


def test_a_model_that_is_not_installed_names_the_pull_command(live_server: LiveServer):
    answer = live_server.ask(GENERATE, {"prompt": "a", "model": "wan-none"})
    assert (answer.status_code, answer.json()["install"]) == (503, "plantain pull wan-none")


def test_variants_are_installed_if_one_is(live_server: LiveServer):
    models = {each["id"]: each for each in live_server.read("/api/models")["models"]}
    assert (models["wan-any"]["weights"], models["wan-any"]["runsOn"]) == ("installed", "local")
    assert models["wan-none"]["weights"] == "missing"
