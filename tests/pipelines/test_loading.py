"""Loading components and tokenizers, on tiny weights of the real classes, and every kind of unusable file."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTokenizer, T5EncoderModel

from pipelines.base import Component, UnusableWeights
from pipelines.loading import load_component, load_small
from tests.support.tiny import flux as tiny_flux


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.make_flux(tmp_path_factory.mktemp("weights") / "flux-dev", "dev")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, for tests that damage it."""
    return Path(shutil.copytree(made, tmp_path / "flux-dev"))


def load(folder: Path, name: str = "transformer", dtype: str = "bfloat16") -> torch.nn.Module:
    return load_component(Component(name, "k", 0, folder / name, dtype))


@pytest.mark.parametrize("name", tiny_flux.FLUX_COMPONENTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_component_is_of_the_class_that_the_index_names_in_the_dtype_asked_for(made: Path, name: str, dtype: str):
    module = load(made, name, dtype)
    assert type(module).__name__ == tiny_flux.model_index(made)[name][1]
    assert {tensor.dtype for tensor in module.parameters()} == {getattr(torch, dtype)}
    assert not module.training
    assert not any(tensor.requires_grad for tensor in module.parameters())


def test_tokenizers_and_schedulers_are_of_the_class_that_the_index_names(made: Path):
    assert isinstance(load_small(made, "tokenizer"), CLIPTokenizer)
    assert isinstance(load_small(made, "scheduler"), FlowMatchEulerDiscreteScheduler)


def test_weights_in_several_files_are_one_component(folder: Path):
    whole = load(folder, "text_encoder_2").state_dict()
    into_shards(folder)
    assert len(list((folder / "text_encoder_2").glob("*.safetensors"))) > 1
    for name, tensor in load(folder, "text_encoder_2").state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_one_missing_file_of_several_is_named(folder: Path):
    into_shards(folder)
    gone = min((folder / "text_encoder_2").glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(UnusableWeights, match=gone.name):
        load(folder, "text_encoder_2")


def into_shards(folder: Path) -> None:
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.bfloat16)
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    encoder.save_pretrained(folder / "text_encoder_2", max_shard_size="8KB")


def test_the_network_is_not_used(made: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    for name in tiny_flux.FLUX_COMPONENTS:
        load(made, name)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        load_small(made, name)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
@pytest.mark.parametrize("name", tiny_flux.FLUX_COMPONENTS)
def test_a_truncated_file_is_named(folder: Path, name: str, keep: int):
    file = next((folder / name).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UnusableWeights, match=f"{name}/{file.stem}"):
        load(folder, name)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path):
    schnell = tiny_flux.make_flux(tmp_path / "flux-schnell", "schnell")
    file = Path("transformer", "diffusion_pytorch_model.safetensors")
    shutil.copy(schnell / file, folder / file)
    with pytest.raises(UnusableWeights, match=r"transformer: 4 tensors are missing, such as time_text_embed\.guidance"):
        load(folder)


@pytest.mark.parametrize(("name", "setting"), [("transformer", "joint_attention_dim"), ("text_encoder_2", "d_model")])
def test_tensors_of_another_shape_are_refused(folder: Path, name: str, setting: str):
    config = folder / name / "config.json"
    config.write_text(config.read_text().replace(f'"{setting}": 32', f'"{setting}": 48'))
    with pytest.raises(UnusableWeights, match=name):
        load(folder, name)


def test_a_pickle_is_not_loaded(folder: Path):
    file = next((folder / "vae").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UnusableWeights, match="vae: no safetensors file"):
        load(folder, "vae")


def test_an_index_may_name_no_class_of_another_library(folder: Path):
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"transformers",\n    "CLIPTokenizer"', '"os",\n    "system"'))
    with pytest.raises(
        UnusableWeights, match=r"model_index\.json: no class for tokenizer in diffusers or transformers"
    ):
        load_small(folder, "tokenizer")


@pytest.mark.parametrize("spoil", [Path.unlink, lambda index: index.write_text("{,")])
def test_a_missing_or_broken_index_is_named(folder: Path, spoil):
    spoil(folder / "model_index.json")
    with pytest.raises(UnusableWeights, match=r"model_index\.json"):
        load(folder)


def test_a_missing_tokenizer_is_named(folder: Path):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UnusableWeights, match="tokenizer"):
        load_small(folder, "tokenizer")
