"""The generation, job, model and health routes, over a real socket to real pipelines."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from skimage import data

from tests.support.server import LiveServer, data_url

ALPHA = Image.new("RGBA", (12, 8), (200, 30, 30, 0))
PHOTO = Image.fromarray(data.astronaut()).resize((96, 64))
GENERATE, UPSCALE, REMOVE = "/api/image/fal/generate", "/api/image/fal/upscale", "/api/image/fal/remove-bg"


@pytest.fixture(autouse=True)
def nothing_runs_on(live_server: LiveServer) -> Iterator[None]:
    """Cancels the jobs that a failed test left, which would block the others."""
    yield
    for job in live_server.read("/api/jobs?limit=20")["jobs"]:
        if job["status"] in ("queued", "running"):
            live_server.ask(f"/api/jobs/{job['id']}/cancel")


@pytest.mark.parametrize("model", ["flux-schnell", "flux-dev", "flux-kontext", "flux-1-dev"])
def test_text_to_image(live_server: LiveServer, model: str):
    answer = live_server.ask(GENERATE, {"prompt": "a red circle", "model": model, "aspectRatio": "16:9", "seed": 5})
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"imageUrl", "seed"}
    assert answer.json()["seed"] == 5
    assert live_server.picture(answer.json()["imageUrl"]).size == (96, 48)


@pytest.mark.parametrize(
    ("model", "workflow"), [("flux-dev", None), ("flux-kontext", None), ("flux-kontext", "style-transfer")]
)
def test_image_to_image_keeps_the_shape(live_server: LiveServer, model: str, workflow: str | None):
    body = {"prompt": "make it blue", "model": model, "imageUrl": data_url(PHOTO), "workflow": workflow}
    answer = live_server.ask(GENERATE, body)
    assert answer.status_code == 200, answer.text
    picture = live_server.picture(answer.json()["imageUrl"])
    assert picture.size == (80, 48), "3:2 at the model's area, in steps of 16 pixels"


def test_the_same_seed_makes_the_same_image(live_server: LiveServer):
    first = live_server.ask(GENERATE, {"prompt": "a cat", "model": "flux-schnell"}).json()
    live_server.ask(GENERATE, {"prompt": "a dog", "model": "flux-dev"})
    second = live_server.ask(GENERATE, {"prompt": "a cat", "model": "flux-schnell", "seed": first["seed"]}).json()
    assert second["seed"] == first["seed"]
    assert second["imageUrl"] != first["imageUrl"]
    assert live_server.client.get(second["imageUrl"]).content == live_server.client.get(first["imageUrl"]).content


@pytest.mark.parametrize(("scale", "size"), [(None, (24, 16)), (2, (24, 16)), (4, (48, 32))])
def test_upscale(live_server: LiveServer, scale: int | None, size: tuple[int, int]):
    body: dict[str, Any] = {"imageUrl": data_url(ALPHA)} | ({"scale": scale} if scale else {})
    answer = live_server.ask(UPSCALE, body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"imageUrl": answer.json()["imageUrl"], "width": size[0], "height": size[1]}
    picture = live_server.picture(answer.json()["imageUrl"])
    assert (picture.size, picture.mode) == (size, "RGBA")


def test_remove_background(live_server: LiveServer):
    answer = live_server.ask(REMOVE, {"imageUrl": data_url(Image.fromarray(data.astronaut()), "jpeg")})
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"imageUrl"}
    picture = live_server.picture(answer.json()["imageUrl"])
    assert (picture.mode, picture.size) == ("RGBA", (512, 512))
    alpha = picture.getchannel("A")
    assert alpha.getpixel((230, 120)) > 240, "her face stays"
    assert alpha.getpixel((330, 60)) < 15, "the background goes"


def test_an_output_is_an_input_without_a_network_hop(live_server: LiveServer):
    first = live_server.ask(GENERATE, {"prompt": "a cat", "model": "flux-schnell"}).json()["imageUrl"]
    names = live_server.file_names()
    answer = live_server.ask(UPSCALE, {"imageUrl": first, "scale": 2})
    assert answer.status_code == 200, answer.text
    assert len(live_server.file_names() - names) == 1, "the input was not copied"


def test_an_upload_is_an_input(live_server: LiveServer):
    content = live_server.client.get(
        live_server.ask(GENERATE, {"prompt": "a", "model": "flux-schnell"}).json()["imageUrl"]
    ).content
    raw = live_server.client.post("/api/uploads", content=content)
    form = live_server.client.post("/api/uploads", files={"file": ("x.png", content)})
    for answer in (raw, form):
        assert answer.status_code == 201, answer.text
        assert live_server.ask(UPSCALE, {"imageUrl": answer.json()["url"]}).status_code == 200


def test_headers_name_the_job_and_the_credits(live_server: LiveServer):
    before = live_server.balance()
    answer = live_server.ask(
        GENERATE, {"prompt": "a", "model": "flux-dev", "hue": "red", "negativePrompt": "b", "strength": 0.5}
    )
    assert answer.headers["x-credits-charged"] == "2"
    assert answer.headers["x-credits-remaining"] == str(before - 2) == str(live_server.balance())
    assert answer.headers["x-served-by"] == "local"
    assert answer.headers["x-ignored-fields"] == "hue, negativePrompt, strength"
    assert answer.headers["x-request-id"].startswith("req_")
    job = live_server.read(f"/api/jobs/{answer.headers['x-job-id']}")
    assert (job["status"], job["credits"], job["servedBy"], job["device"]) == ("succeeded", 2, "local", "cpu")
    assert job["output"] == answer.json()
    assert job["params"]["prompt"] == "a" and job["params"]["guidanceScale"] == 3.5


def test_respond_async(live_server: LiveServer):
    answer = live_server.ask(GENERATE, {"prompt": "a", "model": "flux-schnell"}, Prefer="respond-async")
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/api/jobs/{job['id']}" and answer.headers["x-job-id"] == job["id"]
    assert answer.headers["preference-applied"] == "respond-async"
    assert job["status"] in ("queued", "running")
    done = live_server.until(
        lambda: (found := live_server.read(f"/api/jobs/{job['id']}"))["status"] == "succeeded" and found
    )
    assert live_server.picture(done["output"]["imageUrl"]).size == (64, 64)
    waited = live_server.ask(GENERATE, {"prompt": "a", "model": "flux-schnell"}, Prefer="respond-async, wait=60")
    assert waited.status_code == 200


def test_queued_jobs_show_a_reason_and_can_be_cancelled(live_server: LiveServer, tmp_path: Any):
    flag = tmp_path / "go"
    before = live_server.balance()
    bodies = [{"prompt": prompt, "model": "wayward"} for prompt in (f"wait {flag}", "work", "work")]
    ids = [live_server.ask(GENERATE, body, Prefer="respond-async").json()["id"] for body in bodies]
    running = live_server.until(lambda: (found := live_server.read(f"/api/jobs/{ids[0]}"))["progress"] and found)
    assert (running["status"], running["progress"]["phase"], running["progress"]["steps"]) == ("running", "denoise", 2)
    last = live_server.read(f"/api/jobs/{ids[2]}")
    assert (last["status"], last["queue"]["position"]) == ("queued", 2)
    assert last["queue"]["reason"].startswith("needs 0.0 GiB; the CPU has 6.0 GiB in about")
    assert [job["id"] for job in live_server.read("/api/jobs?limit=2")["jobs"]] == ids[:0:-1]
    assert live_server.ask(f"/api/jobs/{ids[2]}/cancel").json()["status"] == "cancelled"
    assert live_server.ask(f"/api/jobs/{ids[0]}/cancel").status_code == 202
    stopped = live_server.until(
        lambda: (found := live_server.read(f"/api/jobs/{ids[0]}"))["status"] != "running" and found
    )
    assert (stopped["status"], stopped["error"]["code"]) == ("cancelled", "CANCELLED")
    live_server.until(lambda: live_server.read(f"/api/jobs/{ids[1]}")["status"] == "succeeded")
    assert live_server.balance() == before - 1, "only the one that ran is paid for"


def test_a_waiting_request_whose_job_is_cancelled_gets_an_error(live_server: LiveServer, tmp_path: Any):
    answers = []
    body = {"prompt": f"wait {tmp_path / 'never'}", "model": "wayward"}
    waiting = threading.Thread(target=lambda: answers.append(live_server.ask(GENERATE, body)))
    waiting.start()
    job = live_server.until(
        lambda: next((job for job in live_server.read("/api/jobs")["jobs"] if job["status"] == "running"), None)
    )
    live_server.ask(f"/api/jobs/{job['id']}/cancel")
    waiting.join()
    assert (answers[0].status_code, answers[0].json()["code"]) == (409, "CANCELLED")
    assert answers[0].json()["refunded"] == 1


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("raise a secret", 500, "GENERATION_FAILED"),
        ("die", 500, "GENERATION_FAILED"),
        ("run_out", 500, "OUT_OF_MEMORY"),
        ("refuse It has no ears.", 400, "INVALID_MEDIA"),
    ],
)
def test_a_failed_job_is_reported_and_refunded_and_the_next_one_runs(
    live_server: LiveServer, prompt: str, status: int, code: str
):
    before, files = live_server.balance(), live_server.file_names()
    answer = live_server.ask(GENERATE, {"prompt": prompt, "model": "wayward"})
    assert (answer.status_code, answer.json()["code"], answer.json()["refunded"]) == (status, code, 1)
    assert "secret" not in answer.text
    assert live_server.balance() == before == answer.json()["balance"]
    assert live_server.file_names() == files
    assert live_server.ask(GENERATE, {"prompt": "work", "model": "wayward"}).status_code == 200


def test_a_job_whose_worker_is_killed_once_runs_again(live_server: LiveServer, tmp_path: Any):
    answer = live_server.ask(GENERATE, {"prompt": f"die_once {tmp_path / 'flag'}", "model": "wayward"})
    assert answer.status_code == 200, answer.text
    entries = live_server.read("/api/credits/ledger")["entries"]
    assert [(entry["kind"], entry["jobId"]) for entry in entries[:1]] == [("charge", answer.headers["x-job-id"])]


def test_models_are_listed_with_what_they_do_and_whether_they_are_installed(live_server: LiveServer):
    models = {model["id"]: model for model in live_server.read("/api/models")["models"]}
    assert models["flux-kontext"]["workflows"] == ["text-to-image", "image-to-image", "style-transfer"]
    assert (models["flux-dev"]["runsOn"], models["sora-2"]["runsOn"]) == ("local", "fal")
    assert models["flux-dev"]["weights"] == "installed"
    assert (models["wan"]["weights"], models["sora-2"]["weights"]) == ("missing", "none")
    assert models["flux-dev"]["schema"]["required"] == ["prompt", "model"]
    assert live_server.read("/api/models/flux-1-dev")["id"] == "flux-dev"


def test_health(live_server: LiveServer):
    assert live_server.client.get("/healthz", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert live_server.read("/readyz")["workers"] == {"cpu": "idle"}


def test_content_type_and_accept_are_treated_as_by_the_hosted_service(live_server: LiveServer):
    answer = live_server.client.post(REMOVE, content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.json()["code"] == "VALIDATION_ERROR"
    problem = live_server.client.post(REMOVE, content=b"{}", headers={"Accept": "application/problem+json"})
    assert problem.headers["content-type"] == "application/problem+json"


def test_the_openapi_document_describes_the_bodies(live_server: LiveServer):
    document = live_server.read("/api/openapi.json")
    schema = document["paths"][UPSCALE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["scale"]["enum"] == [2, 4]
