"""What is installed: components and their keys, licences, damage, and weights brought on a disk."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.base import Weights
from pipelines.catalog.catalog import Catalog, Model, Source
from pipelines.catalog.reader import load_catalog
from pipelines.weights.errors import HashMismatch, LicenceNotAccepted, NotFound, NothingToPull, PullError
from pipelines.weights.importer import import_folder
from pipelines.weights.installed import Installed
from pipelines.weights.lock import NAME, Lock
from pipelines.weights.pull import pull
from pipelines.weights.verify import Problem, verify
from tests.support.weights_samples import KEPT, a_model, flux_repo, tensors, write_folder

RESTRICTED = {"licence": "Some Licence", "licence_url": "https://example.org/terms", "non_commercial": True}


def in_place(tmp_path: Path, name: str, transformer: int, **changes) -> Model:
    """A model, and its weights on disk."""
    files = flux_repo(transformer, saved_by=name)
    del files["text_encoder/model.fp16.safetensors"]
    folder = write_folder(tmp_path / "disk" / name, files)
    return a_model(name, Source("path", path=str(folder)), **changes)


def installed(tmp_path: Path, model: Model) -> Weights:
    pull(model, tmp_path, accept_licence=True)
    weights = Installed(tmp_path).weights(model)
    assert weights is not None
    return weights


def test_each_folder_with_weights_is_a_component(tmp_path: Path):
    weights = installed(tmp_path, in_place(tmp_path, "dev", 10))
    names = [component.name for component in weights.components]
    assert names == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert (weights.model, weights.family, weights.folder) == ("dev", "flux", tmp_path / "disk" / "dev")
    assert weights.component("vae").path == tmp_path / "disk" / "dev" / "vae"


def test_bytes_are_those_at_the_dtype_loaded(tmp_path: Path):
    weights = installed(tmp_path, in_place(tmp_path, "dev", 10))
    one_file = 2000 * 2 + 8  # bfloat16, and one int64 as stored
    assert weights.component("vae").weights_bytes == one_file
    assert weights.component("transformer").weights_bytes == 2 * one_file
    assert weights.component("vae").dtype == "bfloat16"


def test_models_share_the_components_that_are_equal(tmp_path: Path):
    dev, schnell = (installed(tmp_path, in_place(tmp_path, name, at)) for name, at in [("dev", 10), ("schnell", 20)])
    shared = {component.name for component in dev.components if component.key == schnell.component(component.name).key}
    assert shared == {"text_encoder", "text_encoder_2", "vae"}


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"config": b'{"layers": 3}'}])
def test_another_dtype_or_configuration_is_another_component(tmp_path: Path, change: dict[str, Any]):
    first = installed(tmp_path, in_place(tmp_path, "dev", 10))
    model = in_place(tmp_path, "other", 10, dtype=change.get("dtype", "bfloat16"))
    if config := change.get("config"):
        write_folder(tmp_path / "disk" / "other", {"vae/config.json": config})
    assert installed(tmp_path, model).component("vae").key != first.component("vae").key


def test_a_single_file_is_one_component_named_network(tmp_path: Path):
    write_folder(tmp_path, {"4x.safetensors": tensors(1), "cutter.onnx": b"\x08\x07" + bytes(98)})
    network = installed(tmp_path, a_model("up", Source("path", path="4x.safetensors"), dtype="float32")).component(
        "network"
    )
    assert (network.path, network.weights_bytes) == (tmp_path / "4x.safetensors", 2000 * 4 + 8)
    cutter = installed(tmp_path, a_model("cut", Source("path", path="cutter.onnx"))).component("network")
    assert (cutter.path, cutter.weights_bytes) == (tmp_path / "cutter.onnx", 100)


def test_status(tmp_path: Path):
    model = in_place(tmp_path, "dev", 10)
    here = Installed(tmp_path)
    assert here.status(model) == "missing"
    pull(model, tmp_path)
    assert here.status(model) == "installed"
    assert here.status(Model(**{**vars(model), "weights": None})) == "none"
    file = tmp_path / "disk" / "dev" / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, 100)
    assert here.status(model) == "missing"
    assert verify(tmp_path) == [Problem("dev", file, "size")]


def test_verify_tells_missing_and_changed_files(tmp_path: Path):
    pull(in_place(tmp_path, "dev", 10), tmp_path)
    folder = tmp_path / "disk" / "dev"
    assert verify(tmp_path) == []
    (folder / "model_index.json").unlink()
    (folder / "text_encoder" / "model.safetensors").write_bytes(tensors(7))
    problems = [(problem.file.name, problem.what) for problem in verify(tmp_path)]
    assert problems == [("model_index.json", "missing"), ("model.safetensors", "hash")]


def test_a_non_commercial_licence_is_accepted_once_and_recorded(tmp_path: Path):
    model = in_place(tmp_path, "dev", 10, **RESTRICTED)
    with pytest.raises(LicenceNotAccepted, match=r"Some Licence.*example\.org/terms.*pull dev --accept-licence"):
        pull(model, tmp_path)
    pull(model, tmp_path, accept_licence=True)
    accepted_at = Lock.read(tmp_path).accepted["dev"]
    assert accepted_at.endswith("Z")
    (tmp_path / "disk" / "dev" / "model_index.json").write_bytes(b"{}")
    pull(model, tmp_path)
    assert Lock.read(tmp_path).accepted == {"dev": accepted_at}


def test_a_model_without_weights_of_its_own(tmp_path: Path):
    remote = Model(**{**vars(a_model("pro")), "weights": None, "remote": {"text-to-image": "fal-ai/x"}})
    with pytest.raises(NothingToPull, match="pro runs at fal only"):
        pull(remote, tmp_path)


def test_a_lock_that_cannot_be_read(tmp_path: Path):
    write_folder(tmp_path, {NAME: b"{broken"})
    with pytest.raises(PullError, match="Delete it and pull again"):
        Installed(tmp_path).weights(a_model())


# Weights brought on a disk.


def other_machine(tmp_path: Path, **changes) -> tuple[Path, Model]:
    """Another machine's data folder, with one model pulled into its weights folder."""
    model = in_place(tmp_path, "dev", 10, **changes)
    import_folder(
        tmp_path / "disk" / "dev",
        tmp_path / "usb" / "weights",
        Catalog({"dev": model}),
        model=model,
        accept_licence=True,
    )
    return tmp_path / "usb", model


def test_import_takes_another_machines_weights(tmp_path: Path):
    usb, model = other_machine(tmp_path)
    assert import_folder(usb, tmp_path / "here", Catalog({"dev": model})) == ["dev"]
    mine, theirs = Lock.read(tmp_path / "here").models["dev"], Lock.read(usb / "weights").models["dev"]
    assert (mine.files, mine.source) == (theirs.files, theirs.source)
    assert verify(tmp_path / "here") == []
    pull(model, tmp_path / "here", offline=True)


def test_import_takes_the_licences_acceptance_along(tmp_path: Path):
    usb, model = other_machine(tmp_path, non_commercial=True)
    import_folder(usb, tmp_path / "here", Catalog({"dev": model}))
    assert Lock.read(tmp_path / "here").accepted == Lock.read(usb / "weights").accepted != {}


def test_import_checks_what_the_other_machine_recorded(tmp_path: Path):
    usb, model = other_machine(tmp_path)
    (usb / "weights" / "dev" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(tensors(8))
    with pytest.raises(HashMismatch, match="vae/diffusion_pytorch_model"):
        import_folder(usb, tmp_path / "here", Catalog({"dev": model}))
    assert Installed(tmp_path / "here").status(model) == "missing"


def test_import_notices_a_missing_file(tmp_path: Path):
    usb, model = other_machine(tmp_path)
    (usb / "weights" / "dev" / "model_index.json").unlink()
    with pytest.raises(NotFound, match=r"model_index\.json is not there whole"):
        import_folder(usb, tmp_path / "here", Catalog({"dev": model}))


def test_import_of_what_is_not_in_the_catalogue(tmp_path: Path):
    usb, _model = other_machine(tmp_path)
    with pytest.raises(NothingToPull, match="lists dev"):
        import_folder(usb, tmp_path / "here", Catalog({}))


def test_import_takes_a_plain_folder_for_a_named_model(tmp_path: Path):
    model = in_place(tmp_path, "dev", 10)
    with pytest.raises(NotFound, match="--model ID"):
        import_folder(tmp_path / "disk" / "dev", tmp_path / "here", Catalog({"dev": model}))
    import_folder(tmp_path / "disk" / "dev", tmp_path / "here", Catalog({"dev": model}), model=model)
    entry = Lock.read(tmp_path / "here").models["dev"]
    assert sorted(entry.files) == sorted([*KEPT, "flux1.safetensors"])
    assert (tmp_path / "here" / "dev" / "model_index.json").is_file()
    assert [component.name for component in Installed(tmp_path / "here").weights(model).components] == [
        "text_encoder", "text_encoder_2", "transformer", "vae",
    ]  # fmt: skip


def test_import_of_a_single_file_checks_the_hash_that_the_catalogue_pins(tmp_path: Path):
    write_folder(tmp_path, {"any-name.onnx": b"\x08\x07other"})
    pinned = a_model("u2netp", load_catalog().find("u2netp").weights)
    with pytest.raises(HashMismatch, match=r"u2netp\.onnx"):
        import_folder(tmp_path / "any-name.onnx", tmp_path / "here", Catalog({}), model=pinned)
