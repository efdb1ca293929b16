"""The package, as `pip install` installs it, serves from any folder: built offline, with the demo weights inside."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.settings import PROJECT

SOURCES = ("server", "pipelines", "weights", "docs/astronaut.jpg", "weights.toml", "requirements.in", "pyproject.toml",
           "setup.py", "MANIFEST.in", "README.md")  # fmt: skip
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an sdist, then as a wheel of that, from a copy of the repository whose demo says where it comes from."""
    folder = tmp_path_factory.mktemp("package")
    source, target = folder / "source", folder / "installed"
    for name in SOURCES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copyfile
        copy(PROJECT / name, source / name)
    toml = source / "weights.toml"
    toml.write_text(toml.read_text().replace('name = "Flux Schnell"', 'name = "Flux of the wheel"'))
    run([sys.executable, "-c", SDIST, folder], source)
    [sdist] = folder.glob("*.tar.gz")
    shutil.rmtree(source)
    run(
        [*PIP, "install", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", target, sdist],
        folder,
    )
    return target


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(installed: Path, cwd: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A client of `plantain serve`, and all that it printed at its start."""
    command = [installed / "bin" / "plantain", "serve", "--offline", "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            printed = ""
            while "remove-bg" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            address, key = re.findall(r"(?:listens on|shown this once:) (\S+)", printed)
            retries = httpx.HTTPTransport(retries=9)  # it accepts connections a moment after it prints its address
            with httpx.Client(base_url=address, headers={"x-api-key": key}, timeout=240, transport=retries) as client:
                yield client, printed + process.stdout.readline()
        finally:
            process.kill()


def test_an_installed_package_serves_from_any_folder(installed: Path, tmp_path: Path):
    """Worker and decoder are subprocesses: neither may import what the working directory happens to hold."""
    for name in ("server", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    with serving(installed, tmp_path) as (client, printed):
        assert client.get("/healthz").json() == {"status": "ok"}
        models = {model["id"]: model for model in client.get("/api/models").json()["models"]}
        assert models["flux-schnell"]["weights"] == models["ltx-video"]["weights"] == "demo"
        assert models["flux-schnell"]["name"] == "Flux of the wheel"
        [photo] = re.findall(r"base64 < (\S+)", printed)
        assert Path(photo).is_relative_to(installed)
        url = client.post("/api/uploads", files={"file": Path(photo).read_bytes()}).raise_for_status().json()["url"]
        body = {"prompt": "a red circle", "model": "flux-schnell", "imageUrl": url}
        answer = client.post("/api/image/fal/generate", json=body)
        assert (answer.status_code, answer.headers["x-weights"]) == (200, "demo"), answer.text
    assert (tmp_path / "data" / "plantain.sqlite").exists()


def test_the_package_names_what_it_needs(installed: Path):
    [metadata] = installed.glob("plantain-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: ([\w-]+)", metadata.read_text(), re.MULTILINE)
    lines = (PROJECT / "requirements.in").read_text().splitlines()
    assert needed == [line.split(" ")[0] for line in lines if not line.startswith("#")]


def test_the_code_that_runs_is_the_packages(installed: Path, tmp_path: Path):
    code = "import importlib.util; print(importlib.util.find_spec('server.workers.process').origin)"
    printed = run([sys.executable, "-P", "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert Path(printed.strip()).is_relative_to(installed)
