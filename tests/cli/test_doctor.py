"""`plantain doctor`: its findings, and that it does not reveal the key."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.catalog.reader import load_catalog
from server.cli.doctor import Finding, examine
from server.cli.main import app
from server.settings import Settings
from server.workers.devices import DeviceSpec
from tests.pipelines.test_quantization import table

CPU = DeviceSpec("cpu", "CPU", "cpu", 8 * 2**30, 6 * 2**30)
GPU = DeviceSpec("GPU-1", "H200", "cuda", 140 * 2**30, 135 * 2**30)


def findings(subject: str, settings: Settings, *devices: DeviceSpec) -> list[Finding]:
    found = examine(settings, load_catalog(), [*devices] or [CPU])
    return [finding for finding in found if finding.subject == subject]


def test_devices(tmp_path: Path):
    assert findings("device", Settings(tmp_path), GPU) == [
        Finding("ok", "device", "H200 (GPU-1): 135.0 of 140.0 GiB to use")
    ]
    assert findings("device", Settings(tmp_path))[1].state == "note"


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path):
    [finding] = findings("disk", Settings(tmp_path / "a" / "b"))
    assert str(tmp_path) in finding.text and finding.state in ("ok", "note")


def test_weights_and_their_terms(tmp_path: Path):
    found = {finding.text.split()[0]: finding for finding in findings("weights", Settings(tmp_path, demo=False))}
    catalog = load_catalog()
    assert found.keys() == {model.id for model in catalog.models.values() if model.weights}
    assert found["flux-dev"].text == (
        "flux-dev is missing: plantain pull flux-dev (not for commercial use; its page asks for a login, set HF_TOKEN)"
    )


def test_compiled_models_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "weights.toml").write_text(table("fast", tmp_path, "compiled = true") + table("plain", tmp_path))
    catalog = load_catalog(tmp_path / "weights.toml")
    monkeypatch.delenv("CC", raising=False)
    for path, said in [(str(tmp_path), ["fast"]), (str(tmp_path / "with"), [])]:
        if not said:
            (tmp_path / "with").mkdir()
            (tmp_path / "with/gcc").touch(0o755)
        monkeypatch.setenv("PATH", path)
        found = [each for each in examine(Settings(tmp_path), catalog, [CPU]) if each.subject == "compiler"]
        assert [each.text.split()[0] for each in found] == said


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"fal_key": "secret"}, "a key is set"),
        ({}, "out of reach: no key for it is set. The operator's is read from FAL_KEY."),
        ({"fal_key": "secret", "offline": True}, "out of reach: this server is offline."),
        ({"fal_key": "secret", "route": "local-only"}, "out of reach: this server runs everything itself."),
    ],
)
def test_the_connection_to_fal(tmp_path: Path, settings: dict[str, object], text: str):
    assert [finding.text for finding in findings("fal.ai", Settings(tmp_path, **settings))] == [text]


def test_each_endpoint_known_to_be_retired(tmp_path: Path):
    texts = [finding.text for finding in findings("retired", Settings(tmp_path))]
    assert [text.split(" end")[0] for text in texts] == ["GPT Image 1.5", "Sora 2", "Veo 3.1"]
    assert texts[1] == "Sora 2 ended on 2026-09-24: fal-ai/sora-2/image-to-video, fal-ai/sora-2/text-to-video"


def test_the_command_never_shows_the_key(tmp_path: Path):
    result = CliRunner().invoke(app, ["doctor", "--data", str(tmp_path)], env={"FAL_KEY": "a-secret-key"})
    assert result.exit_code == 0, result.output
    assert "a key is set" in result.output and "a-secret-key" not in result.output
