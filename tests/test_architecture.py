"""Who may import whom, read from the source; and what the HTTP process really loads."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "spandrel", "rembg", "onnxruntime"}
PURE = {"jobs", "scheduler", "fairness", "turns", "simulation", "forecast", "placement", "vram", "protocol", "requests"}
PURE |= {"ahead", "waiting"}
FAMILIES = {"flux", "wan", "ltx", "realesrgan", "rembg"}
LOADING = FAMILIES | {"residency", "packing", "streaming", "link", "meter", "hostram", "embeddings", "casting", "nf4"}
LOADING |= {"loading", "lora", "faults", "tiles", "video", "apart", "prefetch", "layout", "books", "fetching"}
LOADING |= {"flux_recipes", "prompts"}
"""Imported inside the worker process only, so they may import torch at their top."""


def imports(path: Path) -> set[str]:
    """Modules named by import statements anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_pipelines_know_nothing_of_the_server():
    assert {
        str(path): name for path in sources("pipelines") for name in imports(path) if name.startswith("server")
    } == {}


def test_families_do_not_know_each_other():
    for family in FAMILIES:
        path = ROOT / "pipelines" / f"{family}.py"
        others = {f"pipelines.{other}" for other in FAMILIES - {family}}
        assert not path.exists() or not imports(path) & others


def test_the_server_does_not_import_torch_and_its_like():
    for path in sources("server"):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


def test_pure_modules_are_pure():
    """No I/O, no clock, no log: the standard library, each other, and plain data of `pipelines`."""
    forbidden = {"asyncio", "time", "logging", "sqlite3", "subprocess", "os", "fastapi", "httpx"}
    for name in PURE:
        assert not {each.split(".")[0] for each in imports(ROOT / "server" / f"{name}.py")} & forbidden, name


def test_routes_see_neither_worker_nor_supervisor():
    for path in sources("server/api"):
        assert not imports(path) & {"server.worker", "server.supervisor"}, path


def test_nothing_imports_the_app_but_who_serves_it():
    importers = {
        path.name for path in sources("server") if any(name.startswith("server.app") for name in imports(path))
    }
    assert importers == {"serve.py"}


def test_the_http_process_loads_none_of_it():
    """Nor a worker's modules, however indirectly."""
    found = f"sorted({HEAVY!r} & set(sys.modules)), 'server.worker' in sys.modules"
    code = f"import sys, server.cli, server.app; print({found})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == "[] False"
