"""docs/models.md is generated from weights.toml and up to date."""

import importlib.util
from types import ModuleType

from pipelines.catalog.reader import load_catalog
from server.settings import PROJECT


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_table", PROJECT / "scripts" / "tools" / "models_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes():
    made = script()
    written = made.DOCS.read_text("utf-8")
    assert written == made.page(load_catalog()), "run scripts/tools/models_table.py"


def test_the_page_has_every_model_workflow_and_endpoint():
    page = script().page(load_catalog())
    for model in load_catalog().models.values():
        assert f"| `{model.id}` |" in page
        assert all(workflow in page for workflow in model.workflows)
        assert all(f"`{endpoint}`" in page for endpoint in model.remote.values())
        assert model.weights is None or model.weights_gib or model.weights.size_bytes, f"{model.id}: how large?"
