"""The documentation is complete and correct: settings, routes, error codes, models, links; the README's calls run."""

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from pipelines.catalog.reader import load_catalog
from server.errors import PlantainError, subclasses
from server.settings import PROJECT, Settings, from_environment
from tests.support.server import LiveServer

README = (PROJECT / "README.md").read_text()
PAGES = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")]
DOCS = {path.name: path.read_text() for path in (PROJECT / "docs").glob("*.md")}


def test_every_setting_is_in_the_docs_and_can_be_set_by_the_environment():
    for field in fields(Settings):
        assert f"`PLANTAIN_{field.name.upper()}`" in DOCS["configuration.md"], field.name


def test_settings_are_read_from_the_environment():
    found = from_environment({"PLANTAIN_PORT": "9000", "PLANTAIN_OFFLINE": "yes", "PLANTAIN_DATA": "/x", "OTHER": "1"})
    assert found == {"port": 9000, "offline": True, "data": Path("/x")}
    assert from_environment({"PLANTAIN_STOP_PATIENCE_S": "5"}) == {"shutdown_timeout_s": 5.0}, "the former name"
    with pytest.raises(ValueError, match="neither true nor false"):
        from_environment({"PLANTAIN_OFFLINE": "perhaps"})


def test_every_route_is_in_the_docs(live_server: LiveServer):
    text = "".join(DOCS.values())
    for path, operations in live_server.read("/api/openapi.json")["paths"].items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in text, (method, path)


def test_every_error_code_is_in_the_docs():
    for error in subclasses(PlantainError):
        assert f"`{error.code}`" in DOCS["api.md"], error.code


def test_every_model_is_in_the_readme():
    for name in load_catalog(PROJECT / "weights.toml").models:
        assert f"`{name}`" in README, name


def test_the_readme_shows_the_two_commands_first():
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert first and [line.split()[0] for line in first[1].splitlines()] == ["scripts/serve", "scripts/test"]
    for script in ("serve", "test", "lint", "check", "bench", "pin"):
        assert os.access(PROJECT / "scripts" / script, os.X_OK)


def test_the_readmes_calls_work_as_they_stand(live_server: LiveServer):
    """All of its `curl` lines, pasted into one shell, against a server with other weights under the same names."""
    blocks = [block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "curl" in block]
    assert len(blocks) == 4
    script = "set -e\n" + "\necho\n".join(blocks).replace("export PLANTAIN_KEY=bnp_...", "")
    script = script.replace("localhost:8000", str(live_server.client.base_url).removeprefix("http://").rstrip("/"))
    script = script.replace(', \\"model\\": \\"realesr-animevideov3\\"', "")
    environment = {**os.environ, "PLANTAIN_KEY": live_server.key}
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=PROJECT)
    assert run.returncode == 0, run.stderr
    answers = run.stdout.split()
    assert [sorted(re.findall(r'"(\w+)":', answer)) for answer in answers] == [
        ["imageUrl"],
        ["height", "imageUrl", "width"],
        ["imageUrl", "seed"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_and_paths_exist(page: Path):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]+)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
        if anchor and not target.startswith("http"):
            assert anchor in anchors((page.parent / target if target else page).read_text()), target + anchor
    if "measurements" not in page.parts:  # a measurement names the files of its day
        for path in re.findall(r"`((?:server|pipelines|scripts|tests|docs)/[\w./-]+)", text):
            assert (PROJECT / path).exists(), path


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
