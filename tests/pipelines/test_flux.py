"""Flux through the real loaders and the real diffusers classes, on tiny weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from PIL import Image, ImageChops

from pipelines import flux
from pipelines.base import Component, InvalidInput, InvalidOutput, JobCancelled, UnusableWeights
from pipelines.flux import Flux, reference_picture
from pipelines.loading import load_component, load_small
from pipelines.params import ImageToImage, TextToImage
from pipelines.residency.packed import ALIGNMENT_BYTES
from pipelines.residency.residency import Residency
from tests.support.tiny import flux as tiny_flux

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = ("text_encoder", "text_encoder_2", "vae")
MODELS = ("flux-dev", "flux-schnell", "flux-kontext")
Steps = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    tiny_flux.make_all(root)
    return root


@pytest.fixture
def residency(request: pytest.FixtureRequest) -> Residency:
    return Residency("cpu", copies_to_device=getattr(request, "param", True))


both_ways = pytest.mark.parametrize(
    "residency", [False, True], ids=["host is device", "host copies to device"], indirect=True
)


@pytest.fixture
def build(root: Path, residency: Residency) -> Callable[[str], Flux]:
    return lambda model: flux.build(tiny_flux.weights_of(root / model), residency)


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Makes a picture file: a gradient of its own for each seed."""

    def make(width: int = 64, height: int = 64, seed: int = 0, mode: str = "RGB") -> Path:
        shade = Image.linear_gradient("L").rotate(90 * seed).resize((width, height))
        picture = Image.merge("RGB", (shade, shade.transpose(Image.Transpose.FLIP_TOP_BOTTOM), shade))
        path = tmp_path / f"{seed}-{width}x{height}-{mode}.png"
        picture.convert(mode).save(path)
        return path

    return make


def text(prompt: str = "a red circle", **changes: Any) -> TextToImage:
    return TextToImage(**BASICS | {"prompt": prompt} | changes)


def image(*images: Path, **changes: Any) -> ImageToImage:
    return ImageToImage(**BASICS | {"prompt": "a red circle", "images": images} | changes)


BASICS = {"width": 64, "height": 64, "seed": 7, "num_inference_steps": 4, "guidance_scale": 3.5}


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def ignore(phase: str, step: int, steps: int) -> None: ...


def record(steps: Steps) -> Callable[[str, int, int], None]:
    return lambda *step: steps.append(step)


# Output


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (16, 160)])
def test_the_picture_has_exactly_the_size_asked_for(build, model: str, size: tuple[int, int]):
    picture = build(model).generate(text(width=size[0], height=size[1]), ignore)
    assert (picture.size, picture.mode) == (size, "RGB")


@both_ways
@pytest.mark.parametrize("model", MODELS)
def test_a_seed_gives_the_same_picture_after_other_runs_and_evictions(build, residency: Residency, model: str):
    first = build(model).generate(text(), ignore).tobytes()
    for other in MODELS:
        build(other).generate(text("a blue square", seed=1, width=32), ignore)
    assert build(model).generate(text(), ignore).tobytes() == first
    for key, _ in residency.resident():
        residency.evict(key)
    assert build(model).generate(text(), ignore).tobytes() == first


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"prompt": "a blue square"}, {"num_inference_steps": 3}, {"negative_prompt": "a cat"}]
)
def test_each_parameter_changes_the_picture(build, change: dict[str, Any]):
    dev = build("flux-dev")
    assert dev.generate(text(**change), ignore).tobytes() != dev.generate(text(), ignore).tobytes()


def test_only_models_with_guidance_embeddings_use_guidance(build):
    for model, same in (("flux-dev", False), ("flux-schnell", True)):
        one, two = (build(model).generate(text(guidance_scale=scale), ignore).tobytes() for scale in (0.0, 9.0))
        assert (one == two) is same


@pytest.mark.parametrize(("model", "tokens"), [("flux-dev", 512), ("flux-kontext", 512), ("flux-schnell", 256)])
def test_schnell_takes_256_tokens_the_others_512(build, root: Path, residency: Residency, model: str, tokens: int):
    encoder = residency.acquire(tiny_flux.weights_of(root / model).component("text_encoder_2"), load_component)
    seen = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    build(model).generate(text("red circle on a blue background " * 200), ignore)
    assert seen == [(1, tokens)]


def test_prompts_are_not_padded_beyond_the_tokenizers_limit(root: Path, tmp_path: Path, residency: Residency):
    folder = shutil.copytree(root / "flux-dev", tmp_path / "flux-dev")
    tokenizer = load_small(folder, "tokenizer_2")
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder / "tokenizer_2")
    picture = flux.build(tiny_flux.weights_of(folder), residency).generate(text(), ignore)
    assert picture == own(FluxPipeline, folder, max_sequence_length=24)


def test_any_text_is_a_valid_prompt(build):
    pictures = {build("flux-dev").generate(text(prompt), ignore).tobytes() for prompt in ("猫", "🍌", "<pad>", ".")}
    assert len(pictures) == 4


# Equality with diffusers


def test_text_to_image_equals_diffusers(build, root: Path):
    assert build("flux-dev").generate(text(), ignore) == own(FluxPipeline, root / "flux-dev", max_sequence_length=512)
    assert build("flux-schnell").generate(text(), ignore) == own(
        FluxPipeline, root / "flux-schnell", max_sequence_length=256
    )


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equals_diffusers(build, root: Path, photo, strength: float):
    ours = build("flux-dev").generate(image(photo(), strength=strength), ignore)
    assert ours == own(FluxImg2ImgPipeline, root / "flux-dev", image=opened(photo()), strength=strength)


def test_kontext_equals_diffusers(build, root: Path, photo):
    whole = {"max_area": 64 * 64, "_auto_resize": False}
    kontext = build("flux-kontext")
    assert kontext.generate(text(), ignore) == own(FluxKontextPipeline, root / "flux-kontext", **whole)
    ours = kontext.generate(image(photo()), ignore)
    assert ours == own(FluxKontextPipeline, root / "flux-kontext", image=opened(photo()), **whole)


def test_a_negative_prompt_equals_diffusers_true_guidance(build, root: Path):
    ours = build("flux-dev").generate(text(negative_prompt="a cat"), ignore)
    assert ours == own(FluxPipeline, root / "flux-dev", negative_prompt="a cat", true_cfg_scale=2.0)


def own(pipeline: Any, folder: Path, **changes: Any) -> Image.Image:
    """The output of one call of diffusers' pipeline, which loads everything itself."""
    pipe = pipeline.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    params = BASICS | {"prompt": "a red circle", "generator": torch.Generator("cpu").manual_seed(BASICS["seed"])}
    return pipe(**{name: value for name, value in (params | changes).items() if name != "seed"}).images[0]


# Input pictures


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.3, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_strength_is_the_share_of_the_steps_that_run_and_are_reported(build, photo, strength: float, steps: int):
    steps_reported: Steps = []
    build("flux-dev").generate(image(photo(), strength=strength), record(steps_reported))
    assert [step for step in steps_reported if step[0] == "denoise"] == [
        ("denoise", n + 1, steps) for n in range(steps)
    ]


def test_strength_1_ignores_the_picture_and_less_does_not(build, photo):
    dev = build("flux-dev")
    for strength, same in ((1.0, True), (0.75, False)):
        one, two = (dev.generate(image(photo(seed=n), strength=strength), ignore).tobytes() for n in (0, 1))
        assert (one == two) is same


@both_ways
def test_strength_0_is_the_picture_and_needs_no_weights(build, residency: Residency, photo):
    steps_reported: Steps = []
    output = build("flux-dev").generate(image(photo(), strength=0), record(steps_reported))
    assert output == opened(photo())
    assert (steps_reported, residency.resident()) == ([], ())


def test_the_picture_covers_the_output_and_is_cropped_evenly(build, photo):
    output = build("flux-dev").generate(image(photo(320, 64), strength=0), ignore)
    middle = opened(photo(320, 64)).crop((128, 0, 192, 64))
    assert max(high for _, high in ImageChops.difference(output, middle).getextrema()) <= 1


def test_what_is_transparent_becomes_white(build, tmp_path: Path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    output = build("flux-dev").generate(image(tmp_path / "clear.png", strength=0), ignore)
    assert output.getcolors() == [(64 * 64, (255, 255, 255))]


@pytest.mark.parametrize("sizes", [[(64, 64)], [(300, 100)], [(64, 64), (20, 90), (200, 10)]])
def test_kontext_takes_one_picture_or_several(build, photo, sizes: list[tuple[int, int]]):
    kontext = build("flux-kontext")
    paths = [photo(*size, seed=n) for n, size in enumerate(sizes)]
    picture = kontext.generate(image(*paths, width=96, height=48), ignore)
    assert picture.size == (96, 48)
    unseen = kontext.generate(text(width=96, height=48), ignore)
    first = kontext.generate(image(paths[0], width=96, height=48), ignore)
    assert len({picture.tobytes(), unseen.tobytes(), first.tobytes()}) == (2 if len(paths) == 1 else 3)


def test_references_are_side_by_side_and_not_cropped(tmp_path: Path):
    colours = {"red": (30, 60), "lime": (90, 90), "blue": (10, 10)}
    for colour, size in colours.items():
        Image.new("RGB", size, colour).save(tmp_path / f"{colour}.png")
    row = reference_picture(image(*(tmp_path / f"{name}.png" for name in colours), width=512, height=512), 16)
    assert row.size == (816, 320)  # 2.5 : 1, the output's area, multiples of 16
    assert [row.getpixel((x, 160)) for x in (1, 161, 165, 487, 491, 814)] == [
        (255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255), (0, 0, 255)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 1000), (1024, 1024)), ((1500, 1000), (1248, 832)), ((40, 30), (1184, 880)), ((3000, 1), (56080, 16))],
)
def test_a_reference_has_kontexts_trained_area(photo, size: tuple[int, int], expected: tuple[int, int]):
    assert reference_picture(image(photo(*size), width=2048, height=2048), 16).size == expected


# Errors


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("flux-dev", text(width=72)),
        ("flux-kontext", text(height=24)),
        ("flux-dev", image()),
        ("flux-kontext", image()),
        ("flux-dev", image(Path("a.png"), Path("b.png"))),
    ],
)
def test_invalid_input_is_refused_before_anything_is_loaded(build, residency: Residency, model, params):
    with pytest.raises(InvalidInput):
        build(model).generate(params, ignore)
    assert residency.resident() == ()


def test_a_file_that_is_not_a_picture_is_refused(build, tmp_path: Path):
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput):
        build("flux-dev").generate(image(tmp_path / "no.png"), ignore)


def test_progress_is_reported_by_phase(build):
    steps_reported: Steps = []
    build("flux-schnell").generate(text(), record(steps_reported))
    denoise = [("denoise", n, 4) for n in (1, 2, 3, 4)]
    assert steps_reported == [("encode", 0, 1), ("encode", 1, 1), *denoise, ("decode", 0, 1), ("decode", 1, 1)]


@pytest.mark.parametrize("last", range(8))
def test_a_job_can_be_cancelled_at_every_step_without_affecting_the_next(build, last: int):
    dev, steps_reported = build("flux-dev"), []
    expected = dev.generate(text(), ignore)

    def cancel(*step: object) -> None:
        steps_reported.append(step)
        if len(steps_reported) > last:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        dev.generate(text("a cat"), cancel)
    assert len(steps_reported) == last + 1
    assert dev.generate(text(), ignore) == expected


def test_nan_pixels_are_an_error_and_reloaded_weights_work_again(build, root: Path):
    expected = build("flux-dev").generate(text(), ignore)
    residency = Residency("cpu")
    dev = flux.build(tiny_flux.weights_of(root / "flux-dev"), residency)
    transformer = tiny_flux.weights_of(root / "flux-dev").component("transformer")
    residency.acquire(transformer, load_component).proj_out.bias.fill_(float("nan"))
    with pytest.raises(InvalidOutput, match="flux-dev"):
        dev.generate(text(), ignore)
    residency.evict(transformer.key)
    assert dev.generate(text(), ignore) == expected


# Loading


@both_ways
def test_three_models_share_encoders_and_vae(build, root: Path, residency: Residency, monkeypatch: pytest.MonkeyPatch):
    loaded: list[str] = []

    def counted(component: Component) -> torch.nn.Module:
        loaded.append(component.name)
        return load_component(component)

    monkeypatch.setattr(flux, "load_component", counted)
    for model in MODELS:
        build(model).generate(text(), ignore)
    assert sorted(loaded) == sorted([*SHARED, "transformer", "transformer", "transformer"])
    for name in SHARED:
        held = [residency.acquire(tiny_flux.weights_of(root / model).component(name), fail) for model in MODELS]
        assert len({id(module) for module in held}) == 1
        assert len({next(module.parameters()).data_ptr() for module in held}) == 1


def fail(component: Component) -> None:
    pytest.fail(f"{component.name} is loaded again")


@both_ways
def test_resident_bytes_are_those_of_the_buffers(build, root: Path, residency: Residency):
    build("flux-dev").generate(text(), ignore)
    reported = dict(residency.resident())
    for component in tiny_flux.weights_of(root / "flux-dev").components:
        module = residency.acquire(component, fail)
        tensors = {tensor.data_ptr(): tensor for tensor in [*module.parameters(), *module.buffers()]}
        exact = sum(tensor.nbytes for tensor in tensors.values())
        assert next(iter(tensors.values())).untyped_storage().nbytes() == reported[component.key]
        assert exact <= reported[component.key] < exact + ALIGNMENT_BYTES * len(tensors)
        assert component.weights_bytes <= reported[component.key]
        assert {tensor.dtype for tensor in module.parameters()} == {torch.bfloat16}
    assert set(reported) == {component.key for component in tiny_flux.weights_of(root / "flux-dev").components}


@both_ways
def test_components_are_loaded_in_the_order_of_the_phases(build, root: Path, residency: Residency, photo):
    build("flux-dev").generate(image(photo(), strength=0.5), ignore)
    names = {component.key: component.name for component in tiny_flux.weights_of(root / "flux-dev").components}
    assert [names[key] for key, _ in residency.resident()] == ["text_encoder", "text_encoder_2", "transformer", "vae"]


def test_a_broken_file_is_named_and_loaded_components_stay(root: Path, tmp_path: Path):
    folder = Path(shutil.copytree(root / "flux-dev", tmp_path / "flux-dev"))
    weights, residency = tiny_flux.weights_of(folder), Residency("cpu")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    dev = flux.build(weights, residency)
    with pytest.raises(UnusableWeights, match=r"transformer/diffusion_pytorch_model\.safetensors"):
        dev.generate(text(), ignore)
    assert [key for key, _ in residency.resident()] == [weights.component(name).key for name in SHARED[:2]]
    file.write_bytes(whole)
    assert dev.generate(text(), ignore).size == (64, 64)


def test_another_architecture_is_refused(root: Path, tmp_path: Path):
    folder = Path(shutil.copytree(root / "flux-dev", tmp_path / "flux-dev"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"StableDiffusionPipeline"'))
    with pytest.raises(UnusableWeights, match="StableDiffusionPipeline"):
        flux.build(tiny_flux.weights_of(folder), Residency("cpu"))


def test_tiny_weights_are_the_same_every_time_and_shared_byte_for_byte(root: Path, tmp_path: Path):
    again = tiny_flux.make_flux(tmp_path / "again", "dev")
    assert keys(again) == keys(root / "flux-dev")
    for other in ("flux-schnell", "flux-kontext"):
        assert keys(root / other) & keys(again) == {tiny_flux.component_of(again / name).key for name in SHARED}
    assert tiny_flux.model_index(root / "flux-kontext")["_class_name"] == "FluxKontextPipeline"
    assert sum(file.stat().st_size for file in again.rglob("*") if file.is_file()) < 500_000


def keys(folder: Path) -> set[str]:
    return {component.key for component in tiny_flux.weights_of(folder).components}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("model", MODELS)
def test_on_cuda_a_seed_is_the_same_picture_after_swaps(root: Path, model: str):
    residency = Residency("cuda")
    pipeline = flux.build(tiny_flux.weights_of(root / model), residency)
    first = pipeline.generate(text(), ignore)
    for _ in range(10):
        for key, _ in residency.resident():
            residency.evict(key)
        assert pipeline.generate(text(), ignore) == first
    residency.clear()
