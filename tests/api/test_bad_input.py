"""Invalid requests: a clear error in the envelope, no charge, no stored file."""

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.support.server import LiveServer, data_url

GENERATE, UPSCALE, REMOVE = "/api/image/fal/generate", "/api/image/fal/upscale", "/api/image/fal/remove-bg"
VIDEO = "/api/video/fal/generate"
SMALL = data_url(Image.new("RGB", (8, 8), (255, 0, 0)))
ENVELOPE = {"error", "code", "message", "type", "title", "status", "detail", "requestId"}


@pytest.fixture(autouse=True)
def nothing_charged_and_nothing_left_behind(live_server: LiveServer) -> Iterator[None]:
    balance, files, jobs = (
        live_server.balance(),
        live_server.file_names(),
        live_server.read("/api/jobs?limit=1")["jobs"],
    )
    yield
    assert live_server.balance() == balance
    assert live_server.file_names() == files
    assert live_server.read("/api/jobs?limit=1")["jobs"] == jobs


def generate(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "model": "flux-dev"} | changes


CASES: dict[str, tuple[str, Any, int, str, str]] = {
    "no prompt": (GENERATE, {"model": "flux-dev"}, 400, "VALIDATION_ERROR", "prompt: Field required"),
    "empty prompt": (GENERATE, generate(prompt=""), 400, "VALIDATION_ERROR", "prompt"),
    "blank prompt": (GENERATE, generate(prompt="  "), 400, "VALIDATION_ERROR", "prompt"),
    "prompt a number": (
        GENERATE, generate(prompt=5), 400, "VALIDATION_ERROR", "prompt: Input should be a valid string",
    ),
    "seed a string": (GENERATE, generate(seed="7"), 400, "VALIDATION_ERROR", "seed: Input should be a valid integer"),
    "seed too large": (GENERATE, generate(seed=2**32), 400, "VALIDATION_ERROR", "seed"),
    "body a list": (GENERATE, [], 400, "VALIDATION_ERROR", "body"),
    "unknown model": (GENERATE, generate(model="flux-dve"), 404, "MODEL_NOT_FOUND", "Did you mean flux-dev"),
    "model of another kind": (GENERATE, generate(model="u2netp"), 400, "VALIDATION_ERROR", "remove-bg"),
    "not installed": (VIDEO, generate(model="wan"), 503, "MODEL_NOT_INSTALLED", "plantain pull wan"),
    "runs on fal only": (VIDEO, generate(model="sora-2"), 503, "REMOTE_UNAVAILABLE", "fal.ai"),
    "unsupported workflow": (
        GENERATE, generate(workflow="style-transfer", imageUrl=SMALL), 400, "UNSUPPORTED_WORKFLOW",
        "it does text-to-image, image-to-image. These can: flux-kontext.",
    ),
    "workflow without its image": (GENERATE, generate(workflow="image-to-image"), 400, "VALIDATION_ERROR", "imageUrl"),
    "no such workflow": (GENERATE, generate(workflow="dance"), 400, "VALIDATION_ERROR", "workflow"),
    "unsupported aspect ratio": (
        GENERATE, generate(aspectRatio="7:5"), 400, "UNSUPPORTED_ASPECT_RATIO", "it has 1:1, 16:9, 9:16",
    ),
    "no aspect ratio": (GENERATE, generate(aspectRatio="wide"), 400, "VALIDATION_ERROR", "aspectRatio"),
    "scale 3": (UPSCALE, {"imageUrl": SMALL, "scale": 3}, 400, "VALIDATION_ERROR", "scale: Input should be 2 or 4"),
    "no image": (UPSCALE, {}, 400, "VALIDATION_ERROR", "imageUrl: Field required"),
    "a private address": (REMOVE, {"imageUrl": "http://10.1.2.3/a.png"}, 400, "ADDRESS_REFUSED", "10.1.2.3"),
    "the server itself": (REMOVE, {"imageUrl": "http://127.0.0.1:8000/a.png"}, 400, "ADDRESS_REFUSED", "127.0.0.1"),
    "the metadata service": (
        REMOVE, {"imageUrl": "http://169.254.169.254/latest"}, 400, "ADDRESS_REFUSED", "169.254.169.254",
    ),
    "a file": (REMOVE, {"imageUrl": "file:///etc/passwd"}, 400, "ADDRESS_REFUSED", "https:"),
    "not an image": (REMOVE, {"imageUrl": "data:text/plain,hello"}, 400, "INVALID_MEDIA", "not an image"),
    "an own file that is not there": (REMOVE, {"imageUrl": f"/files/{'0' * 48}.png"}, 400, "MEDIA_UNREACHABLE", ""),
    "too large for every device": (GENERATE, generate(model="huge"), 503, "DOES_NOT_FIT", "needs 92.2 GiB"),
    "the second image is bad": (
        GENERATE, generate(model="flux-kontext", imageUrls=[SMALL, "data:,x"]), 400, "INVALID_MEDIA", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(live_server: LiveServer, case: str):
    route, body, status, code, text = CASES[case]
    answer = live_server.ask(route, body)
    told = answer.json()
    assert (answer.status_code, told["code"]) == (status, code), answer.text
    assert told.keys() >= ENVELOPE
    assert text in told["error"]
    assert told["error"] == told["message"] == told["detail"] and told["status"] == status
    assert told["requestId"] == answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"


def test_a_host_that_does_not_respond_is_unreachable(live_server: LiveServer):
    answer = live_server.ask(REMOVE, {"imageUrl": "https://nowhere.invalid/a.png"})
    assert (answer.status_code, answer.json()["code"]) == (400, "MEDIA_UNREACHABLE")


def test_broken_json(live_server: LiveServer):
    for content in (b"{", b"", b"\xff", b"[" * 100_000):
        answer = live_server.client.post(GENERATE, content=content)
        assert (answer.status_code, answer.json()["error"]) == (400, "The body is not JSON.")


def test_a_body_over_the_limit(live_server: LiveServer):
    answer = live_server.client.post(GENERATE, content=b'{"prompt": "' + b"a" * (49 * 2**20) + b'"}')
    assert (answer.status_code, answer.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")
    endless = live_server.client.post(GENERATE, content=(b"a" * 2**20 for _ in range(50)))
    assert endless.status_code == 413


def test_a_wrong_method_gets_the_allowed_ones(live_server: LiveServer):
    answer = live_server.client.get(GENERATE)
    assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, "METHOD_NOT_ALLOWED", "POST")


def test_a_path_that_is_not_there(live_server: LiveServer):
    answer = live_server.client.get("/api/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
    assert live_server.client.get("/api/jobs/job_nothing").json()["code"] == "NOT_FOUND"
    assert live_server.client.get(f"/files/{'0' * 48}.png").status_code == 404
    assert live_server.client.get("/files/..%2f..%2fplantain.sqlite").status_code == 404


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer bnp_wrong", "Basic YTpi"])
def test_an_invalid_key_reveals_nothing(live_server: LiveServer, authorization: str):
    for method, route in (("POST", GENERATE), ("POST", UPSCALE), ("GET", "/api/jobs"), ("GET", "/api/credits")):
        answer = live_server.client.request(method, route, headers={"Authorization": authorization}, content=b"{")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_an_explicit_null_equals_a_missing_field(live_server: LiveServer):
    answer = live_server.ask(UPSCALE, {"imageUrl": None, "scale": None})
    assert answer.json()["code"] == "VALIDATION_ERROR"


def test_limits_of_lists_are_checked(live_server: LiveServer):
    answer = live_server.client.get("/api/jobs?limit=0")
    assert (answer.status_code, answer.json()["code"]) == (400, "VALIDATION_ERROR")
