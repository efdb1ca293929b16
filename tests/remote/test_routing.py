"""Where a job of a model that is installed here runs: a server with one, on no device that could hold it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.catalog.reader import load_catalog
from pipelines.weights.pull import pull
from tests.support.fal import FakeFal
from tests.support.fal_server import RemoteHouse, Street, picture
from tests.support.server import tiny_safetensors

CATALOG = """
[models.big]
name = "Big"
kind = "image"
family = "tests.families.scripted"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "none"
sizes = { "1:1" = [64, 64] }
defaults = { num_inference_steps = 2 }
working = { fixed_bytes = 99000000000 }
weights = { source = "path", path = "PART" }
remote = { text-to-image = "fal-ai/big" }

[models.big-here]
name = "Big, here only"
kind = "image"
family = "tests.families.scripted"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "none"
sizes = { "1:1" = [64, 64] }
defaults = { num_inference_steps = 2 }
weights = { source = "path", path = "PART" }
"""


@pytest.fixture(scope="module")
def fal() -> Iterator[FakeFal]:
    with FakeFal().running() as fake:
        yield fake


@pytest.fixture
def street(fal: FakeFal, tmp_path: Path) -> Street:
    fal.reset()
    fal.result = {"images": [{"url": fal.serves("made.png", picture())}]}
    part, toml = tmp_path / "part.safetensors", tmp_path / "weights.toml"
    part.write_bytes(tiny_safetensors())
    toml.write_text(CATALOG.replace("PART", str(part)))
    street = Street(tmp_path / "data", fal, options={"weights_toml": toml})
    for model in load_catalog(toml).models.values():
        pull(model, street.settings().weights)
    return street


@pytest.fixture
def live_server(street: Street) -> Iterator[RemoteHouse]:
    with street.live_server() as live_server:
        yield live_server


ASK = {"prompt": "a", "model": "big"}


def test_what_no_device_here_could_ever_hold_runs_at_fal(live_server: RemoteHouse):
    answer = live_server.ask("image", ASK)
    assert (answer.status_code, answer.headers["x-served-by"]) == (200, "fal")
    assert live_server.fal.submitted[0].arguments == {"prompt": "a"}, "and not what was chosen for here"


def test_it_does_not_where_the_caller_or_the_model_keeps_it_here(live_server: RemoteHouse):
    for answer in (
        live_server.ask("image", ASK, X_Route="local-only"),
        live_server.ask("image", {**ASK, "model": "big-here"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "DOES_NOT_FIT")
    assert not live_server.fal.submitted


def test_nor_without_a_key(street: Street):
    with street.live_server(fal_key=None) as live_server:
        assert live_server.ask("image", ASK).json()["code"] == "DOES_NOT_FIT"


def test_a_model_that_fal_has_not_cannot_be_asked_for_there(live_server: RemoteHouse):
    answer = live_server.ask("image", {**ASK, "model": "big-here"}, X_Route="remote-only")
    assert (answer.status_code, answer.json()["code"]) == (400, "UNSUPPORTED_WORKFLOW")


def test_the_operator_may_send_everything_to_fal(street: Street):
    with street.live_server(route="remote-only") as live_server:
        assert live_server.ask("image", ASK).headers["x-served-by"] == "fal"
        answer = live_server.ask("image", ASK, X_Route="local-only")
        assert answer.json()["code"] == "DOES_NOT_FIT", "a caller may always keep a job here"
