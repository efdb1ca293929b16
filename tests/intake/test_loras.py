"""LoRAs from `weights.toml` to a picture: listed, pulled, asked for, refused, and their bytes counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.base import Component, ExecutionMode
from pipelines.catalog.catalog import UnknownModel
from pipelines.catalog.reader import load_catalog
from pipelines.catalog.table import CatalogError
from pipelines.params import TextToImage
from pipelines.weights.importer import import_folder
from pipelines.weights.installed import Installed
from pipelines.weights.lock import Lock
from server.cli.main import app
from server.model_registry import ModelRegistry
from server.scheduling.need import Need, Phase, with_extra_bytes
from server.settings import Settings
from tests.catalog.test_catalog import ONE
from tests.support.server import GENERATE, LiveServer
from tests.support.tiny.lora import make_flux_lora

SKETCH = {"id": "sketch", "scale": 1.0}


def body(model: str = "flux-dev", **changes: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "model": model, "seed": 5} | changes


def made(live_server: LiveServer, **changes: Any) -> bytes:
    answer = live_server.ask(GENERATE, body(**changes))
    assert answer.status_code == 200, answer.text
    assert "X-Ignored-Fields" not in answer.headers
    return live_server.client.get(answer.json()["imageUrl"]).content


def test_a_request_picks_a_lora_for_itself_alone(live_server: LiveServer):
    plain = made(live_server)
    worn = made(live_server, loras=[SKETCH])
    assert worn != plain
    assert made(live_server, loras=[{"id": "sketch"}]) == worn, "a scale is 1 if it is not said"
    assert made(live_server, loras=[{"id": "sketch", "scale": -2}]) not in (plain, worn)
    assert (
        made(live_server, loras=[{"id": "sketch", "scale": 0}])
        == made(live_server, loras=[])
        == made(live_server)
        == plain
    )


def test_models_list_their_loras(live_server: LiveServer):
    models = {model["id"]: model for model in live_server.read("/api/models")["models"]}
    assert models["flux-dev"]["loras"] == [{"id": "sketch", "installed": True}, {"id": "elsewhere", "installed": False}]
    assert models["flux-schnell"]["loras"] == []
    assert "flux-dev+sketch" not in models


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loras": [{"id": "none"}]}, "Flux dev has no LoRA 'none'; it has sketch, elsewhere"),
        ({"loras": [SKETCH], "model": "flux-schnell"}, "Flux schnell has no LoRA 'sketch'; it has none"),
        ({"loras": [SKETCH], "model": "wayward"}, "it has none"),
        ({"loras": [SKETCH, SKETCH]}, "each may be picked once"),
        ({"loras": [SKETCH] * 5}, "at most 4"),
        ({"loras": [{"id": "sketch", "scale": 2.1}]}, "less than or equal to 2"),
        ({"loras": [{"id": "sketch", "scale": -2.1}]}, "greater than or equal to -2"),
        ({"loras": [{"id": "sketch", "scale": "1"}]}, "valid number"),
        ({"loras": [{"scale": 1}]}, "required"),
        ({"loras": [{"id": "sketch", "weight": 1}]}, "not permitted"),
        ({"loras": ["sketch"]}, "loras"),
        ({"loras": SKETCH}, "valid list"),
    ],
)
def test_what_cannot_be_meant_is_refused(live_server: LiveServer, changes: dict[str, Any], says: str):
    before = live_server.balance()
    answer = live_server.ask(GENERATE, body(**changes))
    assert (answer.status_code, answer.json()["code"]) == (400, "VALIDATION_ERROR"), answer.text
    assert says in answer.json()["error"]
    assert answer.json()["issues"][0]["path"].startswith("loras")
    assert live_server.balance() == before


def test_a_lora_that_is_not_installed_says_how_to_have_it(live_server: LiveServer):
    answer = live_server.ask(GENERATE, body(loras=[SKETCH, {"id": "elsewhere"}]))
    assert (answer.status_code, answer.json()["code"]) == (503, "MODEL_NOT_INSTALLED")
    assert answer.json()["install"] == "plantain pull flux-dev+elsewhere"


def test_a_remote_model_takes_none(live_server: LiveServer):
    answer = live_server.ask("/api/video/fal/generate", body("sora-2", loras=[SKETCH]))
    assert (answer.status_code, answer.json()["code"]) == (400, "VALIDATION_ERROR")


# Bytes


def test_its_bytes_are_needed_besides(installed_models: Settings):
    shelf = ModelRegistry(load_catalog(installed_models.weights_toml), Installed(installed_models.weights))
    plain = shelf.runnable("flux-dev", 4096, {"loras": []})
    worn = shelf.runnable("flux-dev", 4096, {"loras": [SKETCH]})
    lora = worn.loras["sketch"]
    assert plain.loras == {}
    assert lora.weights_bytes > 1000
    assert worn.need.total_bytes == plain.need.total_bytes + lora.weights_bytes
    assert worn.weights == plain.weights, "one pipeline serves both"


def test_every_phase_has_room_for_them():
    phases = (Phase("denoise", ("a",), 10), Phase("decode", ("b",), 20, 15, ((ExecutionMode("staged"), 17),)))
    assert with_extra_bytes(Need((("a", 5), ("b", 6)), 20, phases), 3).phases == (
        Phase("denoise", ("a",), 13),
        Phase("decode", ("b",), 23, 18, ((ExecutionMode("staged"), 20),)),
    )


def test_files_are_named_for_the_worker_and_not_stored_with_the_job(tmp_path: Path):
    file = Component("network", "k", 5, tmp_path / "a.safetensors")
    sent = {"prompt": "a", "width": 64, "height": 64, "seed": 1, "numInferenceSteps": 1, "loras": [SKETCH]}
    params = TextToImage.model_validate(sent, context={"files": tmp_path, "loras": {"sketch": file}})
    assert params.loras[0].weights == file
    assert params.model_dump(mode="json", by_alias=True)["loras"] == [SKETCH]


# weights.toml, and the command


TOML = f"""
{ONE}
aliases = ["uno"]
QUANTISED

[models.one.loras."Ink-1.0"]
"""


def catalog(tmp_path: Path, lora: str, quantised: str = "") -> Path:
    path = tmp_path / "weights.toml"
    path.write_text(TOML.replace("QUANTISED", quantised) + lora)
    return path


def test_a_lora_is_read_as_a_part_of_its_model(tmp_path: Path):
    found = load_catalog(catalog(tmp_path, 'source = "path"\npath = "ink.safetensors"'))
    ink = found.models["one"].loras["Ink-1.0"]
    assert (ink.id, ink.licence, ink.workflows, list(found.models)) == ("one+Ink-1.0", "MIT", (), ["one"])
    assert found.find_weights("UNO+ink-1.0") == ink
    assert found.find_weights("uno") == found.models["one"]
    assert list(found.with_loras) == ["one", "one+Ink-1.0"]
    with pytest.raises(UnknownModel, match=r"Did you mean one\+Ink-1.0"):
        found.find_weights("one+oil")


@pytest.mark.parametrize(
    ("lora", "quantised", "says"),
    [
        ('source = "hf"\nrepo = "a/b"', "", "files must name the one .safetensors file"),
        ('source = "hf"\nrepo = "a/b"\nfiles = ["*.safetensors"]', "", "files must name the one .safetensors file"),
        ('source = "url"\nurl = "x"', "", "a url needs its sha256"),
        ('licence = "MIT"', "", "source is missing"),
        ('source = "path"\npath = "x"\nscale = 1', "", "scale is not known"),
        ('source = "path"\npath = "x"', 'quantisation = "fp8-layerwise"', "takes no LoRA"),
    ],
)
def test_a_lora_that_cannot_be_meant_is_refused(tmp_path: Path, lora: str, quantised: str, says: str):
    with pytest.raises(CatalogError, match=says):
        load_catalog(catalog(tmp_path, lora, quantised))


def test_a_lora_is_pulled_by_name_and_carried_to_another_machine(tmp_path: Path):
    file = make_flux_lora(tmp_path / "ink.safetensors", seed=1)
    toml = catalog(tmp_path, f'source = "path"\npath = "{file}"')
    data = tmp_path / "data"
    arguments = ["--data", str(data), "--weights-toml", str(toml)]
    result = CliRunner().invoke(app, ["pull", "uno+ink-1.0", *arguments])
    assert result.exit_code == 0, result.output
    entry = Lock.read(data / "weights").models["one+Ink-1.0"]
    assert entry.files["ink.safetensors"].size_bytes == file.stat().st_size
    assert len(entry.files["ink.safetensors"].sha256) == 64

    found = load_catalog(toml)
    assert import_folder(data, tmp_path / "other" / "weights", found) == ["one+Ink-1.0"]
    lora = found.models["one"].loras["Ink-1.0"]
    here = Installed(tmp_path / "other" / "weights").weights(lora)
    assert here and here.components[0].path == tmp_path / "other/weights/one+Ink-1.0/ink.safetensors"
    listed = json.loads(CliRunner().invoke(app, ["models", "--json", *arguments]).output)["models"]
    assert [model["id"] for model in listed] == ["one"]
