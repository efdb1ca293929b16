"""Wan through the real loaders and the real diffusers classes, on tiny weights of each variant."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanVACEPipeline
from PIL import Image

from pipelines import wan
from pipelines.base import Component, ExecutionMode, InvalidInput, InvalidOutput, JobCancelled, UnusableWeights
from pipelines.loading import load_component, load_small
from pipelines.params import ExtendVideo, ImageToVideo, ReferenceToVideo, TextToVideo
from pipelines.residency.residency import Residency
from pipelines.wan import Wan
from tests.support.tiny.video import make_wan, video_weights_of
from tests.support.video_files import boxes, write

pytestmark = pytest.mark.usefixtures("one_thread")
Steps = list[tuple[str, int, int]]
KINDS = ("t2v", "i2v", "flf2v", "vace")
BASICS = {
    "prompt": "a red circle", "width": 64, "height": 48, "num_frames": 9, "fps": 16,
    "seed": 7, "num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "a cat",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        make_wan(root / kind, kind)
    return root


@pytest.fixture
def residency() -> Residency:
    return Residency("cpu", copies_to_device=True)


@pytest.fixture
def build(root: Path, residency: Residency) -> Callable[[str], Wan]:
    return lambda kind: wan.build(video_weights_of(root / kind), residency)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("footage") / "in.mp4", boxes(20, 64, 48), 16)


def text(**changes: Any) -> TextToVideo:
    return TextToVideo(**BASICS | changes)


def image(*images: Path, **changes: Any) -> ImageToVideo:
    return ImageToVideo(**BASICS | changes, images=images)


def extend(video: Path, **changes: Any) -> ExtendVideo:
    return ExtendVideo(**BASICS | {"num_frames": 8} | changes, video=video)


def reference(*images: Path, video: Path | None = None, **changes: Any) -> ReferenceToVideo:
    return ReferenceToVideo(**BASICS | changes, images=images, video=video)


def ignore(phase: str, step: int, steps: int) -> None: ...


def opened(path: Path) -> Image.Image:
    with Image.open(path) as found:
        return found.convert("RGB")


# Output


@pytest.mark.parametrize(("width", "height", "count"), [(64, 48, 9), (48, 64, 1), (32, 16, 13)])
def test_the_clip_has_exactly_the_size_and_frames_asked_for(build, width: int, height: int, count: int):
    clip = build("t2v").generate(text(width=width, height=height, num_frames=count), ignore)
    assert (clip.frames.shape, clip.frames.dtype) == ((count, height, width, 3), np.uint8)
    assert (clip.fps, clip.after) == (16, None)


def test_a_seed_gives_the_same_clip_after_other_runs_and_evictions(build, residency: Residency, picture: Path):
    first = build("t2v").generate(text(), ignore).frames
    build("i2v").generate(image(picture, seed=1), ignore)
    assert np.array_equal(build("t2v").generate(text(), ignore).frames, first)
    for key, _ in residency.resident():
        residency.evict(key)
    assert np.array_equal(build("t2v").generate(text(), ignore).frames, first)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "a blue square"},
        {"num_inference_steps": 3},
        {"negative_prompt": ""},
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0},
    ],
)
def test_each_parameter_changes_the_clip(build, change: dict[str, Any]):
    t2v = build("t2v")
    assert not np.array_equal(t2v.generate(text(**change), ignore).frames, t2v.generate(text(), ignore).frames)


# Equality with diffusers


def test_text_to_video_equals_diffusers(build, root: Path):
    assert np.array_equal(build("t2v").generate(text(), ignore).frames, own(WanPipeline, root / "t2v"))


def test_image_to_video_equals_diffusers(build, root: Path, picture: Path):
    theirs = own(WanImageToVideoPipeline, root / "i2v", image=opened(picture))
    assert np.array_equal(build("i2v").generate(image(picture), ignore).frames, theirs)


def test_first_and_last_frame_equal_diffusers(build, root: Path, picture: Path):
    theirs = own(WanImageToVideoPipeline, root / "flf2v", image=opened(picture), last_image=opened(picture))
    assert np.array_equal(build("flf2v").generate(image(picture, picture), ignore).frames, theirs)


def test_references_equal_diffusers(build, root: Path, picture: Path):
    theirs = own(WanVACEPipeline, root / "vace", reference_images=[opened(picture), opened(picture)])
    assert np.array_equal(build("vace").generate(reference(picture, picture), ignore).frames, theirs)


def test_large_clips_have_another_noise_schedule(build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wan, "SHIFTED_PIXELS", 64 * 48)
    for width, shift in ((64, 3.0), (80, 5.0)):
        seen: list[float] = []

        def spy(model: UniPCMultistepScheduler, *_: Any, seen: list[float] = seen, **__: Any) -> None:
            seen.append(model.config.flow_shift)
            raise JobCancelled

        with monkeypatch.context() as patched, pytest.raises(JobCancelled):
            patched.setattr(UniPCMultistepScheduler, "set_timesteps", spy)
            build("t2v").generate(text(width=width, num_frames=1), ignore)
        assert seen == [shift]


def own(pipeline: Any, folder: Path, **inputs: Any) -> np.ndarray:
    """The output of one call of diffusers' pipeline, which loads everything itself, with the VAE in float32."""
    vae = load_component(video_weights_of(folder).component("vae"))
    pipe = pipeline.from_pretrained(folder, vae=vae, dtype=torch.bfloat16, local_files_only=True)
    if "image" in inputs:
        pipe.image_encoder = load_component(video_weights_of(folder).component("image_encoder"))
    pipe.set_progress_bar_config(disable=True)
    # Encoded by WanPipeline: the others' own `encode_prompt` needs a package, ftfy, that repairs broken Unicode.
    encoder = WanPipeline(pipe.tokenizer, pipe.text_encoder, vae, pipe.scheduler, transformer=pipe.transformer)
    with torch.inference_mode():
        embeds, negative = encoder.encode_prompt(BASICS["prompt"], BASICS["negative_prompt"], max_sequence_length=512)
    left_out = ("seed", "fps", "prompt", "negative_prompt")
    params = {name: value for name, value in BASICS.items() if name not in left_out} | inputs
    params |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    frames = pipe(**params, generator=torch.Generator("cpu").manual_seed(BASICS["seed"])).frames[0]
    return (frames * 255).round().astype(np.uint8)


# Input


@pytest.mark.parametrize(("limit", "tokens"), [(10**30, 512), (512, 512), (24, 24)])
def test_prompts_are_padded_to_512_tokens_or_the_tokenizers_lower_limit(
    root: Path, tmp_path: Path, residency: Residency, limit: int, tokens: int
):
    folder = shutil.copytree(root / "t2v", tmp_path / "t2v")
    tokenizer = load_small(folder, "tokenizer")
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder / "tokenizer")
    weights = video_weights_of(folder)
    seen = tokens_seen(residency.acquire(weights.component("text_encoder"), load_component))
    wan.build(weights, residency).generate(text(num_frames=1, guidance_scale=1.0), ignore)
    assert seen == [(1, tokens)]


def tokens_seen(encoder: torch.nn.Module) -> list[tuple[int, int]]:
    """A list to which the shape of each later input is added."""
    seen: list[tuple[int, int]] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def test_extending_from_the_last_frame_alone(build, footage: Path):
    """Eight frames are requested and nine are made: the first one is the last of the video, and is left out."""
    clip = build("i2v").generate(extend(footage), ignore)
    assert (clip.frames.shape[0], clip.after) == (8, footage)
    start = wan.from_video_end(extend(footage))
    assert (start.frames, start.overlap_frames) == (9, 1)
    assert np.abs(np.asarray(start.inputs["image"]).astype(int) - boxes(20, 64, 48)[19]).mean() < 4


@pytest.mark.parametrize(("added", "seen"), [(8, 17), (64, 17), (68, 13), (80, 1), (120, 1)])
def test_vace_is_conditioned_on_the_last_frames_within_the_trained_length(footage: Path, added: int, seen: int):
    start = wan.vace_from_end(extend(footage, num_frames=added))
    assert (start.overlap_frames, start.frames) == (seen, seen + added)
    assert len(start.inputs["video"]) == len(start.inputs["mask"]) == seen + added
    assert [mask.getpixel((0, 0)) for mask in start.inputs["mask"]] == [0] * seen + [255] * added
    last = np.asarray(start.inputs["video"][seen - 1]).astype(int)
    assert np.abs(last - boxes(20, 64, 48)[19]).mean() < 4


def test_vace_extends(build, footage: Path):
    clip = build("vace").generate(extend(footage), ignore)
    assert (clip.frames.shape[0], clip.after) == (8, footage)


def test_vace_keeps_the_shapes_of_a_reference_video(build, footage: Path):
    start = wan.vace_from_references(reference(video=footage, num_frames=33))
    assert len(start.inputs["video"]) == 33
    assert all(len(set(frame.getpixel((30, 16)))) == 1 for frame in start.inputs["video"]), "grey"
    assert start.inputs["video"][-1].getcolors() == [(64 * 48, (128, 128, 128))], "no video there: anything may come"
    vace = build("vace")
    assert not np.array_equal(
        vace.generate(reference(video=footage), ignore).frames, vace.generate(text(), ignore).frames
    )


def test_vace_takes_a_first_and_a_last_frame(build, picture: Path):
    start = wan.vace_from_image(image(picture, picture))
    assert [n for n, mask in enumerate(start.inputs["mask"]) if not mask.getpixel((0, 0))] == [0, 8]
    assert build("vace").generate(image(picture), ignore).frames.shape[0] == 9


def test_a_picture_covers_the_clip(picture: Path):
    start = wan.from_image(image(picture, width=96, height=32))
    assert start.inputs["image"].size == (96, 32)


# Errors


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("t2v", text(width=72), "multiples of 16"),
        ("t2v", text(num_frames=8), "multiple of 4, plus one"),
        ("i2v", image(Path("a.png"), Path("b.png")), "takes 1 image, not 2"),
        ("flf2v", image(Path("a.png")), "takes 2 images, not 1"),
        ("vace", image(*[Path("a.png")] * 3), "takes 1 or 2 images, not 3"),
        ("vace", reference(), "A reference is needed"),
        ("i2v", extend(Path("a.mp4"), num_frames=9), "multiple of 4"),
    ],
)
def test_invalid_input_is_refused_before_anything_is_loaded(build, residency, kind, params, words: str):
    with pytest.raises(InvalidInput, match=words):
        build(kind).generate(params, ignore)
    assert residency.resident() == ()


@pytest.mark.parametrize("params", [image(Path("no.png")), extend(Path("no.mp4")), reference(video=Path("no.mp4"))])
def test_files_that_cannot_be_read_are_refused(build, tmp_path: Path, params: Any):
    (path := tmp_path / "no").write_bytes(b"nothing")
    changed = {"images": (path,)} if isinstance(params, ImageToVideo) else {"video": path}
    with pytest.raises(InvalidInput):
        build("vace").generate(params.model_copy(update=changed), ignore)


@pytest.mark.parametrize(("kind", "params"), [("t2v", image(Path("a.png"))), ("i2v", text())])
def test_a_workflow_that_the_weights_do_not_support_is_an_error_of_the_operator(build, kind: str, params: Any):
    with pytest.raises(UnusableWeights, match="cannot run"):
        build(kind).generate(params, ignore)


def test_an_index_that_names_another_class_is_refused(root: Path, tmp_path: Path):
    folder = tmp_path / "t2v"
    folder.symlink_to(root / "t2v")
    weights = video_weights_of(folder)
    folder.unlink()
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UnusableWeights, match=r"model_index\.json"):
        wan.build(weights, Residency("cpu"))


def test_progress_is_reported_by_phase(build):
    steps_reported: Steps = []
    build("t2v").generate(text(), lambda *step: steps_reported.append(step))
    denoise = [("denoise", 1, 2), ("denoise", 2, 2)]
    assert steps_reported == [("encode", 0, 1), ("encode", 1, 1), *denoise, ("decode", 0, 1), ("decode", 1, 1)]


@pytest.mark.parametrize("last", range(6))
def test_a_job_can_be_cancelled_at_every_step_without_affecting_the_next(build, last: int):
    model, steps_reported = build("t2v"), []
    expected = model.generate(text(num_frames=5), ignore).frames

    def cancel(*step: object) -> None:
        steps_reported.append(step)
        if len(steps_reported) > last:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        model.generate(text(prompt="a cat", num_frames=5), cancel)
    assert len(steps_reported) == last + 1
    assert np.array_equal(model.generate(text(num_frames=5), ignore).frames, expected)


def test_nan_frames_are_an_error(root: Path):
    residency = Residency("cpu")
    weights = video_weights_of(root / "t2v")
    residency.acquire(weights.component("transformer"), load_component).proj_out.bias.fill_(float("nan"))
    with pytest.raises(InvalidOutput):
        wan.build(weights, residency).generate(text(), ignore)


# What is loaded


def test_the_variants_share_text_encoder_and_vae(build, picture: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[str] = []

    def counted(component: Component) -> torch.nn.Module:
        loaded.append(component.name)
        return load_component(component)

    monkeypatch.setattr(wan, "load_component", counted)
    build("t2v").generate(text(), ignore)
    build("i2v").generate(image(picture), ignore)
    build("vace").generate(text(), ignore)
    assert sorted(loaded) == ["image_encoder", "text_encoder", *["transformer"] * 3, "vae"]


def test_the_vae_is_in_float32_and_the_transformer_in_bfloat16(build, root: Path, residency: Residency):
    build("t2v").generate(text(), ignore)
    weights = video_weights_of(root / "t2v")
    vae, transformer = (residency.acquire(weights.component(name), load_component) for name in ("vae", "transformer"))
    assert {tensor.dtype for tensor in vae.parameters()} == {torch.float32}
    assert transformer.patch_embedding.weight.dtype == torch.bfloat16


def test_the_network_is_not_used(build, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    build("t2v").generate(text(), ignore)


# Execution modes


@pytest.mark.parametrize(
    "mode", [ExecutionMode("staged"), ExecutionMode("streamed"), ExecutionMode("staged", tiled=True)]
)
@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_every_execution_mode_makes_the_same_clip(
    build, root: Path, residency: Residency, kind: str, mode: ExecutionMode
):
    """Also with tiling, if the frame fits in one tile. The VAE's settings are restored afterwards."""
    expected = build(kind).generate(text(), ignore).frames
    residency.clear()
    keys = {part.name: part.key for part in video_weights_of(root / kind).components}
    phases = (
        ("encode", (keys["text_encoder"],)),
        ("denoise", (keys["transformer"], keys["vae"])),
        ("decode", (keys["vae"],)),
    )
    kept = ((keys["transformer"], 0),) if mode.tier == "streamed" else ()
    residency.begin_run(ExecutionMode(mode.tier, mode.tiled, phases, kept))
    clip = build(kind).generate(text(), lambda phase, step, steps: residency.enter_phase(phase))
    assert np.array_equal(clip.frames, expected)
    assert [key for key, _ in residency.resident()] == [keys["vae"]]
    assert not residency.acquire(video_weights_of(root / kind).component("vae"), load_component).use_tiling


def test_large_frames_are_decoded_in_tiles(build, residency: Residency):
    large = {"width": 512, "height": 320, "num_frames": 1, "num_inference_steps": 1}
    whole = build("t2v").generate(text(**large), ignore).frames
    residency.begin_run(ExecutionMode("resident", tiled=True))
    tiles = build("t2v").generate(text(**large), ignore).frames
    assert tiles.shape == whole.shape
    assert not np.array_equal(tiles, whole)


def test_a_prompt_is_encoded_once(build, residency: Residency, root: Path):
    first = build("t2v").generate(text(), ignore).frames
    residency.evict(video_weights_of(root / "t2v").component("text_encoder").key)
    assert np.array_equal(build("t2v").generate(text(), ignore).frames, first)
    assert "text_encoder" not in {held.name for held in residency.component_statuses() if held.device_bytes}
