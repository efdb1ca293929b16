"""Who may import whom, read from the source; and what the HTTP process really loads."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BASE = {"server.errors", "server.settings", "server.timestamps"}
CORE = {"pipelines.base", "pipelines.params", "pipelines.media"}
FAMILIES = {"pipelines.flux", "pipelines.wan", "pipelines.ltx", "pipelines.realesrgan", "pipelines.rembg"}
FAMILY_TOOLS = {
    "pipelines.residency", "pipelines.diffusion", "pipelines.loading", "pipelines.lora", "pipelines.quantization",
}  # fmt: skip
SERVER = {
    "server.accounts", "server.auth", "server.db", "server.dispatch", "server.files", "server.intake", "server.jobs",
    "server.model_registry", "server.remote", "server.scheduling", "server.workers",
}  # fmt: skip
ANYTHING = {"server.cli"}
ALLOWED: dict[str, set[str]] = {
    "server.errors": set(),
    "server.settings": {"pipelines.catalog"},
    "server.timestamps": set(),
    "server.db": {"server.errors", "server.settings"},
    "server.accounts": BASE | {"server.db", "pipelines.catalog"},
    "server.auth": BASE | {"server.accounts", "server.db"},
    "server.jobs": {"server.accounts", "server.db", "server.errors"},
    "server.files": {"server.errors", "pipelines.base", "pipelines.media", "pipelines.python_process"},
    "server.scheduling": {"pipelines.base", "pipelines.catalog"},
    "server.workers": FAMILY_TOOLS | {
        "pipelines.base", "pipelines.params", "pipelines.media", "pipelines.device_errors", "pipelines.python_process",
    },
    "server.model_registry": {
        "server.jobs", "server.scheduling", "server.errors", "pipelines.base", "pipelines.catalog", "pipelines.weights",
    },
    "server.remote": BASE | CORE | {"server.files", "server.jobs", "server.workers", "pipelines.catalog"},
    "server.dispatch": {
        "server.db", "server.jobs", "server.files", "server.scheduling", "server.workers", "server.model_registry",
        "server.remote", "server.errors", "server.timestamps", "pipelines.base",
    },
    "server.intake": BASE | CORE | {
        "server.accounts", "server.db", "server.jobs", "server.files", "server.model_registry", "server.remote",
        "server.dispatch", "pipelines.catalog",
    },
    "server.services": BASE | SERVER | {"pipelines.catalog", "pipelines.weights"},
    "server.api": BASE | {
        "server.services", "server.intake", "server.dispatch", "server.jobs", "server.accounts", "server.auth",
        "server.db", "server.files", "server.model_registry", "pipelines.catalog", "pipelines.media",
        "pipelines.params",
    },
    "server.app": {"server.api", "server.services", "server.db", "server.errors"},
    "pipelines.base": set(),
    "pipelines.device_errors": set(),
    "pipelines.python_process": set(),
    "pipelines.params": {"pipelines.base"},
    "pipelines.media": {"pipelines.base"},
    "pipelines.catalog": {"pipelines.base", "pipelines.params"},
    "pipelines.weights": {"pipelines.base", "pipelines.catalog"},
    "pipelines.residency": {"pipelines.base", "pipelines.device_errors", "pipelines.python_process"},
    "pipelines.quantization": {"pipelines.base", "pipelines.weights"},
    "pipelines.loading": {"pipelines.base", "pipelines.quantization", "pipelines.weights"},
    "pipelines.diffusion": {"pipelines.base", "pipelines.residency"},
    "pipelines.lora": {"pipelines.base", "pipelines.params", "pipelines.loading"},
} | dict.fromkeys(FAMILIES, CORE | FAMILY_TOOLS | {"pipelines.device_errors"})  # fmt: skip
"""What a package may import, itself and third parties aside; a top-level module is a package of its own."""

IMPURE = {"asyncio", "time", "logging", "sqlite3", "sqlite_utils", "subprocess", "os", "threading", "httpx", "fastapi"}
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "spandrel", "rembg", "onnxruntime"}
MAY_LOAD_TORCH = (
    "pipelines/residency/", "pipelines/flux.py", "pipelines/wan.py", "pipelines/ltx.py", "pipelines/realesrgan.py",
    "pipelines/rembg.py", "pipelines/diffusion.py", "pipelines/loading.py", "pipelines/quantization.py",
    "pipelines/lora.py", "pipelines/device_errors.py",
)  # fmt: skip
"""Imported by the worker process only. Other modules may load torch inside a function that only it calls."""
MAX_MODULES_IN_A_FOLDER = 16


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def package_of(module: str) -> str:
    """`server.dispatch.queue` -> `server.dispatch`."""
    return ".".join(module.split(".")[:2])


MODULES = {module_of(path): path for path in sources("server", "pipelines")}


def imported_names(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Every name that an import statement of the file binds, dotted; with `top_level` only those at import time."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it."""
    found = set()
    for name in imported_names(path):
        found |= {name} & MODULES.keys() or {name.rpartition(".")[0]} & MODULES.keys()
    return found - {module_of(path)}


GRAPH = {module: project_imports(path) for module, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when nodes without outgoing or incoming edges are removed again and again."""
    rest = {node: set(targets) for node, targets in graph.items()}
    while True:
        sources_of = Counter(target for targets in rest.values() for target in targets)
        loose = [node for node, targets in rest.items() if not targets & rest.keys() or not sources_of[node]]
        if not loose:
            return [sorted(rest)] if rest else []
        for node in loose:
            del rest[node]
        rest = {node: targets & rest.keys() for node, targets in rest.items()}


@pytest.mark.parametrize(
    "package", sorted({package_of(module) for module in MODULES} - ANYTHING - {"server", "pipelines"})
)
def test_a_package_imports_only_what_the_table_allows(package: str):
    forbidden = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target in sorted(targets)
        if package_of(module) == package and package_of(target) not in ALLOWED[package] | {package}
    ]
    assert forbidden == []


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count, too: nothing may hide a circle."""
    assert circles(GRAPH) == []


def test_no_packages_import_each_other_in_a_circle():
    packages: defaultdict[str, set[str]] = defaultdict(set)
    for module, targets in GRAPH.items():
        packages[package_of(module)] |= {package_of(target) for target in targets} - {package_of(module)}
    assert circles(packages) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_the_scheduler_and_the_protocol_are_pure():
    """No clock, no I/O, no log."""
    for module, path in MODULES.items():
        if package_of(module) == "server.scheduling" or module == "server.workers.protocol":
            assert not {name.split(".")[0] for name in imported_names(path)} & IMPURE, module


def test_only_the_worker_process_touches_torch():
    for path in MODULES.values():
        if not path.relative_to(ROOT).as_posix().startswith(MAY_LOAD_TORCH):
            assert not {name.split(".")[0] for name in imported_names(path, top_level=True)} & HEAVY, path


def test_the_server_never_names_torch():
    for path in sources("server"):
        assert not {name.split(".")[0] for name in imported_names(path)} & HEAVY, path


def test_routes_see_neither_worker_nor_supervisor():
    for module, targets in GRAPH.items():
        if package_of(module) == "server.api":
            assert not {package_of(target) for target in targets} & {"server.workers", "server.scheduling"}, module


def test_only_serve_imports_the_app():
    assert {module for module, targets in GRAPH.items() if "server.app" in targets} == {"server.cli.serve"}


def test_a_folder_has_no_more_modules_than_a_person_can_scan():
    folders = Counter(path.parent for path in sources("server", "pipelines") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > MAX_MODULES_IN_A_FOLDER} == {}


def assigned_attributes(path: Path) -> Iterator[tuple[str, str, int]]:
    """(owner, attribute, line) of each assignment to an attribute of a name."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) else []:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute):
                    yield ast.unparse(each.value), each.attr, node.lineno


def test_only_worker_state_changes_a_worker_state():
    tree = ast.parse((ROOT / "server" / "dispatch" / "worker_state.py").read_text())
    (worker_state,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "WorkerState"]
    fields = {node.target.id for node in worker_state.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert len(fields) > 15
    foreign = [
        f"{path.name}:{line} {owner}.{attribute}"
        for path in sources("server")
        for owner, attribute, line in assigned_attributes(path)
        if attribute in fields and "worker" in owner
    ]
    assert foreign == []


def test_nobody_assigns_to_the_parts_of_the_server():
    """What an object needs comes through its constructor: no attribute of another one is set afterwards."""
    foreign = [
        f"{path.relative_to(ROOT)}:{line} {owner}.{attribute}"
        for path in sources("server")
        for owner, attribute, line in assigned_attributes(path)
        if owner not in MAY_BE_ASSIGNED_TO
    ]
    assert foreign == []


MAY_BE_ASSIGNED_TO = {
    "self": "its own",
    "app.state": "Starlette's place for what an application holds",
    "request.state": "Starlette's place for what a request holds",
    "prefetch": "WorkerState's own PrefetchState",
    "counts": "the counters of one import, made in the function that counts",
    "self.config": "uvicorn's own configuration",
}
"""With the reason."""


def test_the_http_process_loads_no_torch():
    """Nor a worker's modules, however indirectly."""
    found = f"sorted({HEAVY!r} & set(sys.modules)), 'server.workers.process' in sys.modules"
    code = f"import sys, server.cli.main, server.app; print({found})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[] False"
