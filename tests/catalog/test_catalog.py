"""`weights.toml`, and how exactly its reader refuses what cannot be meant."""

from pathlib import Path

import pytest

from pipelines.catalog.catalog import Catalog, Credits, Frames, Model, PhaseWorking, Retired, UnknownModel
from pipelines.catalog.reader import load_catalog
from pipelines.catalog.table import CatalogError

PROMISED = [
    "flux-pro",
    "flux-dev",
    "flux-schnell",
    "flux-kontext",
    "seedream-4.0",
    "seedream-4.5",
    "gpt-image-1.5",
    "recraft-v3",
    "ideogram-v3",
    "kling-1.6",
    "minimax-video",
    "wan-2.1",
    "sora-2",
    "veo-3.1",
    "seedance-1.5",
    "ltx-video",
]
LOCAL = ["flux-schnell", "flux-dev", "flux-kontext", "wan-2.1", "ltx-video"]

ONE = """
[models.one]
name = "One"
kind = "image"
family = "flux"
workflows = ["text-to-image"]
credits = { base = 1 }
licence = "MIT"
weights = { source = "hf", repo = "some/one" }
"""


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def read(tmp_path: Path, text: str) -> Catalog:
    (tmp_path / "weights.toml").write_text(text)
    return load_catalog(tmp_path / "weights.toml")


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(CatalogError) as caught:
        read(tmp_path, text)
    return str(caught.value).removeprefix(f"{tmp_path / 'weights.toml'}: ")


def test_every_promised_model_is_there(catalog: Catalog):
    assert set(PROMISED) <= set(catalog.models)


def test_where_models_run(catalog: Catalog):
    assert [name for name in PROMISED if catalog.models[name].runs_on == "both"] == sorted(LOCAL, key=PROMISED.index)
    assert catalog.models["flux-pro"].runs_on == "fal"
    assert catalog.models["realesrgan-x4plus-anime"].runs_on == "local"


def test_flux_dev(catalog: Catalog):
    dev = catalog.find("FLUX.1-dev")
    assert (dev.id, dev.family, dev.dtype, dev.gated, dev.non_commercial) == (
        "flux-dev",
        "flux",
        "bfloat16",
        True,
        True,
    )
    assert dev.workflows == ("text-to-image", "image-to-image")
    assert dev.defaults == {"num_inference_steps": 28, "guidance_scale": 3.5, "strength": 0.75}
    assert [phase.name for phase in dev.working.phases] == ["encode", "denoise", "decode"]
    assert dev.working.phases[1] == PhaseWorking("denoise", ("transformer",), 76_000_000, 580)
    assert dev.weights is not None
    assert dev.weights.skip == ("flux1-dev.safetensors", "ae.safetensors")


def test_what_may_be_tuned(catalog: Catalog):
    assert "guidance_scale" not in catalog.models["flux-schnell"].defaults
    assert "strength" not in catalog.models["flux-kontext"].defaults


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-kontext"])
def test_flux_sizes_are_about_a_megapixel_in_the_ratio_asked_for(catalog: Catalog, name: str):
    sizes = catalog.models[name].sizes
    assert list(sizes) == ["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "21:9", "9:21", "5:4", "4:5"]
    for ratio, (width, height) in sizes.items():
        across, down = map(int, ratio.split(":"))
        assert width % 16 == height % 16 == 0
        assert width / height == pytest.approx(across / down)
        assert 0.9e6 < width * height < 1.1e6


def test_retired_models_tell_when_and_what_instead(catalog: Catalog):
    retired = {name: model.retired for name, model in catalog.models.items() if model.retired}
    assert retired == {
        "gpt-image-1.5": Retired("2026-12-01", "openai/gpt-image-2"),
        "sora-2": Retired("2026-09-24", None),
        "veo-3.1": Retired("2026-10-22", "google/gemini-omni-flash"),
    }


def test_defaults_for_calls_without_a_model(catalog: Catalog):
    assert catalog.default_models == {"upscale": "realesrgan-x4plus", "remove-bg": "u2netp"}
    assert catalog.starter == ("u2netp", "realesrgan-x4plus", "realesrgan-x4plus-anime", "realesr-animevideov3")


def test_aliases_in_any_case(catalog: Catalog):
    assert catalog.find("Kling-1.6-Pro").id == "kling-1.6"
    assert catalog.find("seedance-1.5-pro").id == "seedance-1.5"


def test_an_unknown_model_names_those_that_resemble_it(catalog: Catalog):
    with pytest.raises(UnknownModel, match="There is no model 'flux-shnell'") as caught:
        catalog.find("flux-shnell")
    assert caught.value.name == "flux-shnell"
    assert caught.value.close[0] == "flux-schnell"


def test_wan_stands_for_its_variants_best_first(catalog: Catalog):
    wan = catalog.models["wan-2.1"]
    assert [each.id for each in wan.variants["extend"]][:2] == ["wan-2.1-vace-14b", "wan-2.1-i2v-14b-480p"]
    assert (wan.weights, wan.runs_on) == (None, "both")


def test_a_video_model_has_sizes_by_resolution_and_the_defaults_of_its_family(catalog: Catalog):
    large = catalog.models["wan-2.1-i2v-14b-720p"]
    assert list(large.resolutions) == ["720p"]
    assert large.sizes == large.resolutions["720p"]
    assert (large.defaults["num_inference_steps"], large.defaults["guidance_scale"]) == (40, 5.0)
    assert (large.frames, large.dtypes["vae"]) == (Frames(step=4, max=81, fps=(16,)), "float32")


def test_those_that_can(catalog: Catalog):
    able = {model.id for model in catalog.that_can("video", "extend") if not model.id.startswith("wan-2.1-")}
    assert able == {"ltx-video", "veo-3.1", "wan-2.1"}
    assert catalog.that_can("image", "extend") == []


def test_a_model_is_a_table(tmp_path: Path):
    one = read(tmp_path, ONE).models["one"]
    assert isinstance(one, Model)
    assert (one.credits, one.dtype, one.size_multiple, one.runs_on) == (Credits(1, 0), "float32", 1, "local")


def test_a_model_overrides_its_family(tmp_path: Path):
    family = '[families.flux]\ndtype = "bfloat16"\nsize_multiple = 16\nsizes = { "1:1" = [64, 64] }\n'
    one = read(tmp_path, family + ONE + 'dtype = "float16"\n').models["one"]
    assert (one.dtype, one.size_multiple, one.sizes) == ("float16", 16, {"1:1": (64, 64)})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (ONE + "variants = { extend = ['one'] }", "[models.one]: variants.extend: one is no model that does extend"),
        (
            ONE + "variants = { text-to-image = ['one'] }",
            "[models.one]: variants.text-to-image: not one but its variants need weights",
        ),
        (
            ONE + 'sizes = { "480p" = { "1:1" = [64, 64] } }\ndefaults = { resolution = "720p" }',
            "[models.one]: sizes has no resolution 720p",
        ),
        (ONE + "licnce = 'MIT'", "[models.one]: licnce is not known; did you mean licence?"),
        (ONE.replace('licence = "MIT"', ""), "[models.one]: licence is missing"),
        (ONE.replace("base = 1", "base = '1'"), "[models.one]: credits: base must be a whole number, not '1'"),
        (ONE.replace("base = 1", "base = true"), "[models.one]: credits: base must be a whole number, not True"),
        (ONE.replace('"image"', '"images"'), "[models.one]: kind 'images' is none of image, video, upscale, remove-bg"),
        (ONE + "defaults = { steps = 4 }", "[models.one]: defaults: steps is not known; known are num_inference_steps"),
        (ONE + 'sizes = { "1:1" = [64] }', "[models.one]: sizes.1:1 must be [width, height]"),
        (ONE + 'size_multiple = 16\nsizes = { "1:1" = [64, 65] }', "[models.one]: sizes.1:1 is not a multiple of 16"),
        (ONE + 'dtype = "int4"', "[models.one]: dtype 'int4' is none of float32, float16, bfloat16"),
        (ONE + 'remote = { upscale = "x" }', "[models.one]: remote.upscale is not one of its workflows"),
        (ONE.replace('["text-to-image"]', "[]"), "[models.one]: workflows is empty"),
        (ONE.replace('["text-to-image"]', '["sing"]'), "[models.one]: workflows 'sing' is none of text-to-image"),
        (ONE.replace('repo = "some/one"', "revision = 'x'"), "[models.one]: weights: repo missing"),
        (ONE.replace('"hf", repo', '"url", url'), "[models.one]: weights: a url needs its sha256"),
        (
            ONE.replace('"hf", repo', '"ftp", repo'),
            "[models.one]: weights: source 'ftp' is none of hf, url",
        ),
        (ONE.replace('"hf", repo', '"hf", sha256'), "[models.one]: weights: sha256 is not known; known are repo"),
        (ONE.replace('family = "flux"', ""), "[models.one]: family is missing"),
        (ONE.replace("weights =", "# "), "[models.one] runs nowhere"),
        (ONE + ONE.replace(".one]", ".two]\naliases = ['ONE']"), "[models.two]: ONE is a name of one already"),
        ("[families.flux]\nlicence = 'MIT'" + ONE, "[families.flux]: licence is not known"),
        (
            "[default_models]\nupscale = 'one'" + ONE,
            "[default_models]: upscale = 'one' is not the id of a model",
        ),
        ("starter = ['two']" + ONE, "starter: 'two' is not the id of a model with weights"),
        ("modles = 1" + ONE, "top level: modles is not known; did you mean models?"),
        ("models = 1", "top level: models must be a table, not 1"),
        ("[models", "Expected"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, error: str):
    assert refused(tmp_path, text).startswith(error)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(CatalogError, match="No such file"):
        load_catalog(tmp_path / "none.toml")
