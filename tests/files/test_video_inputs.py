"""Input videos and audio: what is taken, what is refused, and that nothing is left of what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fal import FakeFal
from tests.support.fal_server import FILM, PICTURE, VOICE, RemoteHouse, Street, data_url


@pytest.fixture(scope="module")
def fal() -> Iterator[FakeFal]:
    with FakeFal().running() as fake:
        yield fake


@pytest.fixture
def live_server(fal: FakeFal, tmp_path: Path) -> Iterator[RemoteHouse]:
    fal.reset()
    fal.result = {"video": {"url": fal.serves("made.mp4", FILM)}}
    with Street(tmp_path, fal).live_server() as live_server:
        yield live_server


def extend(url: str) -> dict[str, str]:
    return {"prompt": "a", "model": "veo-3.1", "videoUrl": url}


def names(live_server: RemoteHouse) -> set[str]:
    return {path.name for path in live_server.services.files.root.iterdir()}


def test_a_video_from_another_server_is_fetched_here_and_uploaded(live_server: RemoteHouse):
    answer = live_server.ask("video", extend(live_server.fal.serves("mine.mp4", FILM)))
    assert answer.status_code == 200, answer.text
    assert list(live_server.fal.uploads.values()) == [FILM]
    assert live_server.fal.submitted[0].arguments["video_url"].startswith(f"{live_server.fal.url}/cdn/")


@pytest.mark.parametrize(
    ("content", "mime", "suffix", "facts"),
    [(FILM, "video/mp4", ".mp4", {"duration": 1.5}), (VOICE, "audio/wav", ".wav", {"duration": 0.5})],
)
def test_an_upload(live_server: RemoteHouse, content: bytes, mime: str, suffix: str, facts: dict[str, float]):
    answer = live_server.client.post("/api/uploads", content=content, headers={"Content-Type": mime})
    assert answer.status_code == 201, answer.text
    url = answer.json().pop("url")
    assert url.endswith(suffix) and answer.json() == {"url": url, **facts}
    assert live_server.read(url) == content
    if suffix == ".mp4":
        assert live_server.ask("video", extend(url)).status_code == 200
        assert len(names(live_server)) == 2, "the upload and the output: no copy"


@pytest.mark.parametrize(
    ("field", "url", "code"),
    [
        ("videoUrl", data_url(PICTURE, "video/mp4"), "INVALID_MEDIA"),
        ("videoUrl", data_url(VOICE, "video/mp4"), "INVALID_MEDIA"),
        ("videoUrl", data_url(FILM[: len(FILM) // 2], "video/mp4"), "INVALID_MEDIA"),
        ("videoUrl", data_url(b"#EXTM3U\nfile:///etc/passwd\n", "video/mp4"), "INVALID_MEDIA"),
        ("videoUrl", "file:///etc/passwd", "ADDRESS_REFUSED"),
        ("videoUrl", "http://169.254.169.254/a.mp4", "ADDRESS_REFUSED"),
        ("audioUrl", data_url(PICTURE, "audio/wav"), "INVALID_MEDIA"),
        ("audioUrl", data_url(b"", "audio/wav"), "INVALID_MEDIA"),
    ],
)
def test_what_is_refused_leaves_nothing_and_costs_nothing(live_server: RemoteHouse, field: str, url: str, code: str):
    before = live_server.balance()
    body = {**extend(data_url(FILM, "video/mp4")), "audioUrl": data_url(VOICE, "audio/wav"), field: url}
    answer = live_server.ask("video", body)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert (live_server.balance(), names(live_server), live_server.fal.submitted) == (before, set(), [])


def test_a_video_that_is_too_large(live_server: RemoteHouse, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.api.middleware.MAX_UPLOAD_BYTES", len(FILM) - 1)
    answer = live_server.client.post("/api/uploads", content=FILM, headers={"Content-Type": "video/mp4"})
    assert (answer.status_code, answer.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert names(live_server) == set()
