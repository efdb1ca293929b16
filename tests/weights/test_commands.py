"""`plantain pull`, `verify`, `import` and `models`, as typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server.cli import weights
from tests.support.weights_samples import flux_repo, tensors, write_folder

CATALOGUE = """
starter = ["mine"]

[models.mine]
name = "Mine"
kind = "upscale"
family = "realesrgan"
workflows = ["upscale"]
credits = { base = 1 }
licence = "Some [strict] Licence"
licence_url = "https://example.org/terms"
non_commercial = true
weights = { source = "path", path = "mine.safetensors" }

[models.far]
name = "Far"
kind = "image"
family = "flux"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "MIT"
weights = { source = "hf", repo = "some/far" }
"""

LAZY = ["huggingface_hub", "httpx", "numpy", "rich.progress", "uvicorn", "torch"]


@pytest.fixture
def plantain(tmp_path: Path, monkeypatch):
    app = typer.Typer()
    weights.register(app)
    write_folder(tmp_path, {"weights.toml": CATALOGUE.encode(), "data/weights/mine.safetensors": tensors(1)})
    monkeypatch.setenv("PLANTAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PLANTAIN_WEIGHTS_TOML", str(tmp_path / "weights.toml"))
    return lambda *words: CliRunner().invoke(app, words)


def test_the_starter_set_is_pulled_once_its_licence_is_accepted(plantain):
    refused = plantain("pull", "--starter")
    assert (refused.exit_code, "plantain pull mine --accept-licence" in refused.stderr) == (1, True)
    assert plantain("pull", "--starter", "--accept-licence").exit_code == 0
    again = plantain("pull", "--starter")
    assert (again.exit_code, again.output) == (0, "")
    assert plantain("pull", "mine").stdout == "mine is installed already.\n"


def test_pull_wants_a_model(plantain):
    refused = plantain("pull")
    assert refused.exit_code == 2
    assert "--starter" in refused.stderr


def test_pull_of_an_unknown_model(plantain):
    refused = plantain("pull", "mime")
    assert (refused.exit_code, refused.stderr) == (1, "There is no model 'mime'. Did you mean mine?\n")


def test_pull_offline(plantain, monkeypatch):
    monkeypatch.setenv("PLANTAIN_OFFLINE", "1")
    refused = plantain("pull", "far")
    assert refused.exit_code == 1
    assert refused.stderr == "far is not installed and the network is off. Bring it with: plantain import DIR\n"


def test_verify(plantain, tmp_path: Path):
    plantain("pull", "mine", "--accept-licence")
    assert plantain("verify").stdout == "All weights are intact.\n"
    (tmp_path / "data" / "weights" / "mine.safetensors").write_bytes(tensors(2))
    wrong = plantain("verify")
    assert wrong.exit_code == 1
    assert wrong.stdout.startswith("mine: ")
    assert "mine.safetensors: hash is wrong. Pull mine again." in wrong.stdout.replace("\n", " ")


def test_import(plantain, tmp_path: Path):
    folder = write_folder(tmp_path / "usb", flux_repo(1))
    assert plantain("import", str(folder)).exit_code == 1
    done = plantain("import", str(folder), "--model", "far")
    assert (done.exit_code, done.stdout) == (0, "Imported far.\n")


def test_models(plantain):
    rows = json.loads(plantain("models", "--json").stdout)["models"]
    assert rows[1] == {
        "id": "far", "name": "Far", "kind": "image", "workflows": ["text-to-image"], "runsOn": "local",
        "weights": "missing", "licence": "MIT", "aliases": [],
    }  # fmt: skip
    assert "[strict]" in plantain("models").stdout


def test_what_is_installed_is_found_without_a_heavy_import(tmp_path: Path):
    """`plantain serve` checks the starter models at every start."""
    code = f"import server.cli.weights, sys; print(sorted(set({LAZY}) & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
