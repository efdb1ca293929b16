"""GGUF and nf4: bytes as computed, pictures equal in every tier and close to the plain one, bad files refused."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
from gguf import GGMLQuantizationType as Kind
from typer.testing import CliRunner

from pipelines.base import ExecutionMode, UnusableWeights, Weights
from pipelines.catalog.catalog import Catalog
from pipelines.catalog.reader import load_catalog
from pipelines.catalog.table import CatalogError
from pipelines.flux import build
from pipelines.loading import load_component
from pipelines.params import TextToImage
from pipelines.residency.packed import ALIGNMENT_BYTES, BLOCK_ALIGNMENT_BYTES, PackedModule
from pipelines.residency.residency import Residency
from pipelines.weights.errors import Damaged, NothingToPull, PickleRefused
from pipelines.weights.files import choose
from pipelines.weights.formats import KINDS, check_content, gguf_tensors
from pipelines.weights.installed import Installed
from pipelines.weights.lock import Lock
from pipelines.weights.pull import pull
from pipelines.weights.sizes import block_of
from server.cli.main import app
from tests.support.tiny import video as tiny_video
from tests.support.tiny.flux import make_flux
from tests.support.tiny.gguf import tensors_of, write_gguf

TABLE = """
[models.{name}]
name = "{name}"
kind = "{kind}"
family = "{family}"
dtype = "bfloat16"
workflows = ["text-to-{kind}"]
credits = {{ base = 1 }}
licence = "none"
weights = {{ source = "path", path = "{path}" }}
{more}
"""
QUANTISED = ["flux-q8", "flux-q5", "flux-nf4", "flux-fp8"]
GGUF_OF = {"flux-q8": "flux", "flux-q5": "flux", "wan-q8": "wan"}


def table(name: str, path: Path, more: str = "", family: str = "flux") -> str:
    return TABLE.format(name=name, path=path, more=more, family=family, kind="video" if family == "wan" else "image")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalog, Installed]:
    """Plain tiny models, and tables beside them with the same weights quantised; all installed in place."""
    root = tmp_path_factory.mktemp("quantised")
    flux = make_flux(root / "flux", "dev", single_layers=3)
    wan = tiny_video.make_wan(root / "wan", "t2v")
    plain = tensors_of(flux / "transformer")
    text = table("flux", flux) + table("wan", wan, family="wan")
    text += table("flux-nf4", flux, 'quantisation = "nf4"') + table("flux-fp8", flux, 'quantisation = "fp8-layerwise"')
    text += table("wan-nf4", wan, 'quantisation = "nf4"', "wan")
    files = {
        "flux-q8": write_gguf(root / "q8.gguf", plain, Kind.Q8_0),
        "flux-q5": write_gguf(root / "q5.gguf", plain, Kind.Q5_0, plain=Kind.F16),
        "wan-q8": write_gguf(root / "wan.gguf", tensors_of(wan / "transformer"), Kind.Q8_0),
    }
    for name, file in files.items():
        text += table(name, file, f'quantisation = "gguf"\nbase = "{GGUF_OF[name]}"', GGUF_OF[name])
    (root / "weights.toml").write_text(text)
    catalog = load_catalog(root / "weights.toml")
    for model in catalog.models.values():
        pull(model, root / "weights")
    return catalog, Installed(root / "weights")


def weights_of(shelf: tuple[Catalog, Installed], name: str) -> Weights:
    catalog, installed = shelf
    weights = installed.weights(catalog.models[name])
    assert weights
    return weights


def all_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers that come from files; shared memory counts once."""
    tensors = [*module.parameters()] + [
        each for name, each in module.named_buffers() if name.endswith(("absmax", "code"))
    ]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("name", ["flux-q8", "flux-q5", "flux-nf4", "wan-q8", "wan-nf4"])
def test_bytes_computed_from_headers_are_those_of_the_loaded_tensors(shelf: tuple[Catalog, Installed], name: str):
    component = weights_of(shelf, name).component("transformer")
    plain = weights_of(shelf, name.partition("-")[0]).component("transformer")
    assert component.key != plain.key
    module = load_component(component)
    assert component.weights_bytes == all_bytes(module) < plain.weights_bytes
    layout = PackedModule.of(module).layout
    assert len(component.block_bytes) == len(layout.blocks) > 1
    computed = sorted(component.block_bytes)
    for size, block in zip(computed, sorted(layout.blocks, key=lambda each: each.size_bytes), strict=True):
        assert 0 <= block.size_bytes - size < ALIGNMENT_BYTES * len(block.slots)
    slack = ALIGNMENT_BYTES * len(layout.slots) + BLOCK_ALIGNMENT_BYTES * len(layout.blocks)
    unsaved = sum(each.nbytes for each in module.buffers())
    assert 0 <= layout.total_bytes - component.weights_bytes <= slack + unsaved


def picture(weights: Weights, tier: Any = "resident", copies: bool = True) -> np.ndarray:
    """The picture of a run. With copies, it runs twice, with everything evicted in between."""
    residency = Residency("cpu", copies_to_device=copies)
    transformer, clip, t5, vae = (
        weights.component(name).key for name in ("transformer", "text_encoder", "text_encoder_2", "vae")
    )
    phases = (("encode", (clip, t5)), ("denoise", (transformer,)), ("decode", (vae,)))
    params = TextToImage(prompt="a cat", width=64, height=64, seed=1, num_inference_steps=3, guidance_scale=3.5)
    flux = build(weights, residency)
    made = []
    for _ in range(1 + copies):
        residency.begin_run(
            ExecutionMode(tier, phases=phases, streamed_bytes=((transformer, 0),) if tier == "streamed" else ())
        )
        made.append(np.asarray(flux.generate(params, lambda phase, step, steps: residency.enter_phase(phase))))
        residency.evict_all()
    assert (made[0] == made[-1]).all()
    return made[0]


@pytest.mark.parametrize("name", QUANTISED[:3])
def test_a_picture_is_the_same_in_every_tier_and_after_swaps_and_near_the_plain_one(
    shelf: tuple[Catalog, Installed], name: str
):
    expected = picture(weights_of(shelf, name), copies=False)
    for tier in ("resident", "staged", "streamed"):
        assert (picture(weights_of(shelf, name), tier) == expected).all(), tier
    plain = picture(weights_of(shelf, "flux"), copies=False)
    off = np.abs(expected.astype(int) - plain).mean()
    assert 0 < off < {"flux-q8": 2, "flux-q5": 6, "flux-nf4": 16}[name], off


@pytest.mark.parametrize(("name", "worst"), [("flux-q8", 0.01), ("flux-q5", 0.04), ("flux-nf4", 0.1), ("wan-nf4", 0.1)])
def test_a_matrix_equals_the_plain_one_within_the_error_of_the_format(
    shelf: tuple[Catalog, Installed], name: str, worst: float
):
    """Mean error over mean size: a half step of 8, 5 and 4 bits."""
    module = load_component(weights_of(shelf, name).component("transformer"))
    plain = load_component(weights_of(shelf, name.partition("-")[0]).component("transformer"))
    compared = 0
    for path, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and type(module.get_submodule(path)) is not torch.nn.Linear:
            eye = torch.eye(layer.in_features, dtype=torch.bfloat16)
            bias = 0 if layer.bias is None else layer.bias
            with torch.inference_mode():
                wide = (module.get_submodule(path)(eye) - bias).T
            off = (wide.float() - layer.weight.float()).abs().mean() / layer.weight.float().abs().mean()
            assert off < worst, path
            compared += 1
    assert compared > 10


def test_quantised_weights_are_a_table_beside_the_plain_ones(shelf: tuple[Catalog, Installed]):
    plain = weights_of(shelf, "flux")
    keys = {weights_of(shelf, name).component("transformer").key for name in ["flux", *QUANTISED]}
    assert len(keys) == 1 + len(QUANTISED), "each is another component"
    for name in QUANTISED:
        shared = {
            part.name for part in weights_of(shelf, name).components if part.key == plain.component(part.name).key
        }
        assert shared == {"text_encoder", "text_encoder_2", "vae"}, name


def test_a_gguf_model_is_installed_only_together_with_its_base(shelf: tuple[Catalog, Installed], tmp_path: Path):
    catalog, _ = shelf
    here = Installed(tmp_path)
    pull(catalog.models["flux-q8"], tmp_path)
    assert here.status(catalog.models["flux-q8"]) == "missing"
    pull(catalog.models["flux"], tmp_path)
    assert here.status(catalog.models["flux-q8"]) == "installed"


def test_pulling_it_pulls_its_base(shelf: tuple[Catalog, Installed], tmp_path: Path):
    toml = shelf[1].root.parent / "weights.toml"
    result = CliRunner().invoke(app, ["pull", "flux-q8", "--data", str(tmp_path), "--weights-toml", str(toml)])
    assert result.exit_code == 0, result.output
    assert set(Lock.read(tmp_path / "weights").models) == {"flux", "flux-q8"}
    assert Installed(tmp_path / "weights").status(shelf[0].models["flux-q8"]) == "installed"


def test_a_gguf_file_that_lacks_a_tensor_or_was_replaced_is_not_used(shelf: tuple[Catalog, Installed], tmp_path: Path):
    tensors = tensors_of(weights_of(shelf, "flux").folder / "transformer")
    del tensors["transformer_blocks.0.attn.to_q.bias"]
    file = write_gguf(tmp_path / "less.gguf", tensors, Kind.Q8_0)
    toml = tmp_path / "weights.toml"
    folder = weights_of(shelf, "flux").folder
    toml.write_text(table("flux", folder) + table("less", file, 'quantisation = "gguf"\nbase = "flux"'))
    for model in (made := load_catalog(toml)).models.values():
        pull(model, tmp_path / "weights")
    component = weights_of((made, Installed(tmp_path / "weights")), "less").component("transformer")
    with pytest.raises(UnusableWeights):
        load_component(component)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UnusableWeights, match="replaced"):
        load_component(component)


def test_a_gguf_file_is_taken_only_where_it_is_named():
    names = ["flux1-dev-Q8_0.gguf", "flux1-dev-Q4_0.gguf", "config.json"]
    assert choose(names, "hub", files=("flux1-dev-Q8_0.gguf",)) == ["flux1-dev-Q8_0.gguf"]
    with pytest.raises(NothingToPull):
        choose(names, "hub")
    with pytest.raises(NothingToPull):
        choose(names, "hub", files=("*.gguf",))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('quantisation = "gguf"', "go together"),
        ('base = "flux"', "go together"),
        ('quantisation = "gguf"\nbase = "elsewhere"', "no plain flux model"),
        ('quantisation = "gguf"\nbase = "flux"', r"the one \.gguf file"),
        (
            'quantisation = "gguf"\nbase = "flux"\n[models.x.loras.a]\nsource = "path"\npath = "a.safetensors"',
            "no LoRA",
        ),
    ],
)
def test_an_inconsistent_table_is_refused(tmp_path: Path, more: str, says: str):
    (tmp_path / "weights.toml").write_text(table("flux", tmp_path) + table("x", tmp_path, more))
    with pytest.raises(CatalogError, match=says):
        load_catalog(tmp_path / "weights.toml")


# The header of a GGUF file


def test_the_kinds_are_the_gguf_packages_and_those_that_diffusers_computes_with():
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in map(Kind, KINDS)}
    assert known == KINDS
    assert {KINDS[number][0] for number in KINDS} == {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} | {"F32", "F16"}


def test_the_header_says_what_the_gguf_package_reads(tmp_path: Path):
    tensors = {f"blocks.{n}.w": torch.randn(3 + n, 256) for n in range(3)} | {"bias": torch.randn(5)}
    for kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1):
        file = write_gguf(tmp_path / "a.gguf", tensors, kind)
        theirs = gguf.GGUFReader(file).tensors
        ours = gguf_tensors(file)
        assert [(each.name, each.kind, each.elements, each.size_bytes) for each in ours] == [
            (each.name, each.tensor_type.name, each.n_elements, each.n_bytes) for each in theirs
        ]
    assert block_of("double_blocks.7.img_attn.qkv.weight") == ("double_blocks.", 7), "as Flux's makers name them"


def head(tensors: int = 1, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)


def text(word: bytes) -> bytes:
    return struct.pack("<Q", len(word)) + word


def of_kind(number: int) -> Callable[[bytes], bytes]:
    return lambda good: head() + text(b"w") + struct.pack("<IQIQ", 1, 32, number, 0) + bytes(999)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda good: good[:-64], "its header promises"),
        (lambda good: good[:200], r"ends within|requires a buffer|promises"),
        (lambda good: good + bytes(64), "its header promises"),
        (lambda good: good[:4] + b"\x09" + good[5:], "version 2 or 3"),
        (lambda good: head(tensors=2**40), "tensors"),
        (lambda good: head(pairs=2**60), "values"),
        (lambda good: head(pairs=1) + struct.pack("<Q", 2**62), "a text of"),
        (lambda good: head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**62), "ends within a list"),
        (lambda good: head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 2**62), "requires a buffer"),
        (lambda good: head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 2), "a list of lists"),
        (lambda good: head(pairs=1) + text(b"k") + struct.pack("<I", 77), "a value of type 77"),
        (of_kind(39), "kind 39"),
        (lambda good: head() + text(b"w") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(999), "rows of 33"),
        (lambda good: head() + text(b"w") + struct.pack("<IQIQ", 1, 2**63, 0, 0) + bytes(999), "promises"),
        (lambda good: head() + text(b"w") + struct.pack("<I", 4_000_000), "dimensions"),
    ],
)
def test_a_header_that_promises_what_is_not_there_is_refused(tmp_path: Path, harm: Callable[[bytes], bytes], says: str):
    file = write_gguf(tmp_path / "a.gguf", {"w": torch.randn(4, 32)}, Kind.Q8_0)
    check_content(file, file.name)
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(Damaged, match=says):
        check_content(file, file.name)


def test_a_pickle_that_is_named_gguf_is_refused_as_one(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"\x80\x04" + bytes(60))
    with pytest.raises(PickleRefused):
        check_content(tmp_path / "a.gguf", "a.gguf")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_quantised_pictures_are_the_same_in_every_tier(shelf: tuple[Catalog, Installed]):
    for name in QUANTISED:
        residency = Residency("cuda")
        flux = build(weights_of(shelf, name), residency)
        key = weights_of(shelf, name).component("transformer").key
        params = TextToImage(prompt="a cat", width=64, height=64, seed=1, num_inference_steps=3, guidance_scale=3.5)
        made = []
        for kept in ((), ((key, 0),)):
            residency.begin_run(ExecutionMode("streamed" if kept else "resident", streamed_bytes=kept))
            made.append(flux.generate(params, lambda phase, step, steps: None).tobytes())
            residency.evict_all()
        assert made[0] == made[1], name
        residency.clear()
