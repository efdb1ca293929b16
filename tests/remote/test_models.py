"""Every model and workflow that fal runs, from the HTTP call to the file on disk: what reached fal, what came back."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.catalog.reader import load_catalog
from tests.support import fal_expected
from tests.support.fal import KEY, FakeFal
from tests.support.fal_expected import CASES, Case
from tests.support.fal_server import FILM, PICTURE, VOICE, RemoteHouse, Street, data_url, picture

CATALOG = load_catalog()
INPUTS = {
    fal_expected.IMAGE: data_url(PICTURE, "image/png"),
    fal_expected.VIDEO: data_url(FILM, "video/mp4"),
    fal_expected.AUDIO: data_url(VOICE, "audio/wav"),
}
CONTENTS = {"png": PICTURE, "mp4": FILM, "wav": VOICE}
MADE = picture((80, 40))


@pytest.fixture(scope="module")
def fal() -> Iterator[FakeFal]:
    with FakeFal().running() as fake:
        yield fake


@pytest.fixture(scope="module")
def open_house(fal: FakeFal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteHouse]:
    with Street(tmp_path_factory.mktemp("data"), fal).live_server() as live_server:
        yield live_server


@pytest.fixture
def live_server(open_house: RemoteHouse) -> RemoteHouse:
    open_house.fal.reset()
    return open_house


def named(fal: FakeFal, sent: Any) -> Any:
    """What was sent, with files by how they came and what they are, each checked to be the input's bytes."""
    if isinstance(sent, dict):
        return {key: named(fal, value) for key, value in sent.items()}
    if isinstance(sent, list):
        return [named(fal, value) for value in sent]
    if isinstance(sent, str) and sent.startswith("data:"):
        assert base64.b64decode(sent.partition(",")[2]) == PICTURE
        return "data:png"
    if isinstance(sent, str) and sent.startswith(f"{fal.url}/cdn/"):
        name = sent.rpartition("/")[2]
        suffix = name.rpartition(".")[2]
        assert fal.uploads[name] == CONTENTS[suffix]
        return f"upload:{suffix}"
    return sent


def filled(sent: Any) -> Any:
    if isinstance(sent, list):
        return [filled(each) for each in sent]
    return INPUTS.get(sent, sent) if isinstance(sent, str) else sent


def test_every_model_and_workflow_at_fal_has_an_expectation():
    there = {(model.id, workflow) for model in CATALOG.models.values() for workflow in model.remote}
    assert there == {(case.model, case.workflow) for case in CASES}


def test_every_endpoint_has_its_facts_and_every_fact_a_case():
    named = {endpoint for model in CATALOG.models.values() for endpoint in model.remote.values()}
    named |= {endpoint.several for endpoint in CATALOG.endpoints.values() if endpoint.several}
    assert named == CATALOG.endpoints.keys() == {case.endpoint for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model} {case.workflow} {case.endpoint}")
def test_the_exact_request_and_the_documented_answer(live_server: RemoteHouse, case: Case):
    fal, kind = live_server.fal, CATALOG.models[case.model].kind
    answers(fal, kind)
    body = {name: filled(value) for name, value in case.sent.items()} | {"model": case.model}
    prompt = {"prompt": "a boat"} if kind in ("image", "video") else {}
    before = live_server.balance()

    answer = live_server.ask(kind, body | prompt)

    assert answer.status_code == 200, answer.text
    assert [job.endpoint for job in fal.submitted] == [case.endpoint]
    assert named(fal, fal.submitted[0].arguments) == case.reaches | (prompt if case.prompt else {})
    assert answer.headers.get("x-ignored-fields", "") == case.ignored
    assert answer.headers["x-served-by"] == "fal"
    assert before - live_server.balance() == int(answer.headers["x-credits-charged"]) > 0
    check_answer(live_server, kind, case, answer.json())
    assert KEY not in str(live_server.job(answer.headers["x-job-id"]))


def answers(fal: FakeFal, kind: str) -> None:
    if kind == "video":
        fal.result = {"video": {"url": fal.serves("made.mp4", FILM), "content_type": "video/mp4"}}
    elif kind == "image":
        fal.result = {"images": [{"url": fal.serves("made.png", MADE)}], "has_nsfw_concepts": [False]}
    else:
        fal.result = {"image": {"url": fal.serves("made.png", MADE), "width": 1, "height": 1}}


def check_answer(live_server: RemoteHouse, kind: str, case: Case, answer: dict[str, Any]) -> None:
    url = answer.pop("videoUrl" if kind == "video" else "imageUrl")
    assert url.startswith("http://testserver/files/")
    assert live_server.read(url) == (FILM if kind == "video" else MADE)
    match kind:
        case "video":
            assert answer == {"duration": 1.5}, "what the file really holds"
        case "upscale":
            assert answer == {"width": 80, "height": 40}, "what the file really holds"
        case "image":
            assert answer.keys() == {"seed"}
            if "seed" in case.reaches:
                assert answer["seed"] == 7
        case _:
            assert answer == {}


def test_one_shape_of_output_is_as_good_as_another(live_server: RemoteHouse):
    url = live_server.fal.serves("made.png", MADE)
    shapes = [{"images": [{"url": url}]}, {"image": {"url": url}}, {"images": [url]}, {"file": {"url": url}}]
    for live_server.fal.result in [*shapes, {"image": {"url": data_url(MADE, "image/png")}}]:
        answer = live_server.ask("image", {"prompt": "a", "model": "flux-pro"})
        assert live_server.read(answer.json()["imageUrl"]) == MADE
    video = live_server.fal.serves("made.mp4", FILM)
    for live_server.fal.result in [{"video": {"url": video}}, {"video": [{"url": video}]}, {"file": {"url": video}}]:
        assert live_server.ask("video", {"prompt": "a", "model": "kling-1.6"}).json()["duration"] == 1.5


def test_the_file_is_named_for_what_it_is(live_server: RemoteHouse):
    live_server.fal.result = {"images": [{"url": live_server.fal.serves("a.png", picture(format="JPEG"))}]}
    answer = live_server.ask("image", {"prompt": "a", "model": "flux-pro"})
    assert answer.json()["imageUrl"].endswith(".jpg")
    assert live_server.client.get(answer.json()["imageUrl"]).headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("model", "sent", "told", "seed"),
    [
        ("flux-pro", None, 99, 99),  # fal chose, and says so
        ("flux-pro", 7, 7, 7),
        ("gpt-image-1.5", 7, None, 0),  # it takes none
        ("recraft-v3", None, None, 0),
    ],
)
def test_the_answers_seed(live_server: RemoteHouse, model: str, sent: int | None, told: int | None, seed: int):
    live_server.fal.result = {"images": [{"url": live_server.fal.serves("a.png", MADE)}]} | (
        {"seed": told} if told else {}
    )
    answer = live_server.ask("image", {"prompt": "a", "model": model, "seed": sent})
    assert answer.json()["seed"] == seed


def test_a_seed_is_chosen_where_fal_would_not_tell_it(live_server: RemoteHouse):
    live_server.fal.result = {"images": [{"url": live_server.fal.serves("a.png", MADE)}]}
    answer = live_server.ask("image", {"prompt": "a", "model": "seedream-4.5", "imageUrl": INPUTS["<image>"]})
    assert answer.json()["seed"] == live_server.fal.submitted[0].arguments["seed"]


@pytest.mark.parametrize(
    ("model", "sent", "error"),
    [
        ("kling-1.6", {"duration": 7}, "duration: Kling 1.6 Pro makes 5 or 10 seconds, not 7"),
        ("veo-3.1", {"aspectRatio": "1:1"}, "Veo 3.1 has no aspect ratio 1:1; it has 16:9, 9:16."),
        ("sora-2", {"resolution": "8k"}, "Sora 2 has no resolution 8k; it has 720p."),
        ("kling-1.6", {"imageUrls": [INPUTS["<image>"]] * 3},
         "imageUrls: Kling 1.6 Pro takes at most 2 images for image-to-video"),
        ("kling-1.6", {"workflow": "lip-sync"}, "videoUrl: lip-sync needs a video"),
        ("kling-1.6", {"workflow": "reference-to-video"}, "imageUrl: reference-to-video needs an image"),
    ],
)  # fmt: skip
def test_what_a_model_has_not_is_refused_before_anything_is_sent(
    live_server: RemoteHouse, model: str, sent: dict[str, Any], error: str
):
    before = live_server.balance(), {path.name for path in live_server.services.files.root.iterdir()}
    answer = live_server.ask("video", {"prompt": "a", "model": model, **sent})
    assert (answer.status_code, answer.json()["error"]) == (400, error)
    assert not live_server.fal.submitted and not live_server.fal.uploads
    assert before == (live_server.balance(), {path.name for path in live_server.services.files.root.iterdir()})


@pytest.mark.parametrize(
    ("model", "sent", "credits"),
    [
        ("kling-1.6", {}, 12), ("kling-1.6", {"duration": 10}, 22), ("minimax-video", {"duration": 6}, 10),
        ("veo-3.1", {"workflow": "extend", "videoUrl": INPUTS["<video>"]}, 32),
        ("kling-1.6", {"videoUrl": INPUTS["<video>"], "audioUrl": INPUTS["<audio>"]}, 5),
    ],
)  # fmt: skip
def test_a_video_costs_by_its_length(live_server: RemoteHouse, model: str, sent: dict[str, Any], credits: int):
    answers(live_server.fal, "video")
    answer = live_server.ask("video", {"prompt": "a", "model": model, **sent})
    assert answer.headers["x-credits-charged"] == str(credits)


def test_a_large_file_is_uploaded_in_parts(
    fal: FakeFal, live_server: RemoteHouse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("server.remote.uploads.WHOLE_BYTES", 1000)
    monkeypatch.setattr("server.remote.uploads.PART_BYTES", len(FILM) // 3 + 1)
    answers(fal, "video")
    answer = live_server.ask("video", {"prompt": "a", "model": "veo-3.1", "videoUrl": INPUTS["<video>"]})
    assert answer.status_code == 200
    assert fal.parts == [{"partNumber": n, "etag": f"etag-{n}"} for n in (1, 2, 3)]
    assert named(fal, fal.submitted[0].arguments)["video_url"] == "upload:mp4"


def test_an_input_file_of_this_server_and_the_jobs_params(live_server: RemoteHouse):
    answers(live_server.fal, "video")
    made = live_server.ask("video", {"prompt": "a", "model": "kling-1.6"}).json()["videoUrl"]
    answer = live_server.ask("video", {"prompt": "b", "model": "veo-3.1", "videoUrl": made, "duration": 7})
    assert answer.status_code == 200, answer.text
    job = live_server.job(answer.headers["x-job-id"])
    assert job["params"] == {"prompt": "b", "duration": 7.0, "videoUrl": made}
    assert (job["servedBy"], job["device"], job["workflow"]) == ("fal", None, "extend")
