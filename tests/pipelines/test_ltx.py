"""LTX Video through the real loaders and the real diffusers classes, on tiny weights."""

import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from pipelines import ltx
from pipelines.base import ExecutionMode, InvalidInput, InvalidOutput, JobCancelled, UnusableWeights
from pipelines.loading import load_component, load_small
from pipelines.ltx import Ltx
from pipelines.params import ExtendVideo, ImageToVideo, ReferenceToVideo, TextToVideo
from pipelines.residency.residency import Residency
from tests.support.tiny.video import make_ltx, video_weights_of
from tests.support.video_files import boxes, write

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]
Steps = list[tuple[str, int, int]]
BASICS = {
    "prompt": "a red circle", "width": 64, "height": 32, "num_frames": 9, "fps": 24,
    "seed": 7, "num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "a cat",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ltx(tmp_path_factory.mktemp("weights") / "ltx")


@pytest.fixture
def residency() -> Residency:
    return Residency("cpu", copies_to_device=True)


@pytest.fixture
def model(folder: Path, residency: Residency) -> Ltx:
    return ltx.build(video_weights_of(folder), residency)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.linear_gradient("L").resize((64, 32)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("footage") / "in.mp4", boxes(30, 64, 32), 24)


def text(**changes: Any) -> TextToVideo:
    return TextToVideo(**BASICS | changes)


def image(*images: Path, **changes: Any) -> ImageToVideo:
    return ImageToVideo(**BASICS | changes, images=images)


def extend(video: Path, **changes: Any) -> ExtendVideo:
    return ExtendVideo(**BASICS | {"num_frames": 8} | changes, video=video)


def reference(video: Path | None, *images: Path, **changes: Any) -> ReferenceToVideo:
    return ReferenceToVideo(**BASICS | changes, images=images, video=video)


def ignore(phase: str, step: int, steps: int) -> None: ...


def frames_of(model: Ltx, params: TextToVideo) -> np.ndarray:
    return model.generate(params, ignore).frames


# Output


@pytest.mark.parametrize(("width", "height", "count"), [(64, 32, 9), (32, 96, 1), (96, 64, 25)])
def test_the_clip_has_exactly_the_size_and_frames_asked_for(model: Ltx, width: int, height: int, count: int):
    clip = model.generate(text(width=width, height=height, num_frames=count), ignore)
    assert (clip.frames.shape, clip.frames.dtype) == ((count, height, width, 3), np.uint8)
    assert (clip.fps, clip.after) == (24, None)


def test_a_seed_gives_the_same_clip_after_other_runs_and_evictions(model: Ltx, residency: Residency, picture: Path):
    first = frames_of(model, text())
    frames_of(model, image(picture, seed=1))
    assert np.array_equal(frames_of(model, text()), first)
    for key, _ in residency.resident():
        residency.evict(key)
    assert np.array_equal(frames_of(model, text()), first)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "a blue square"},
        {"num_inference_steps": 2},
        {"negative_prompt": ""},
        {"guidance_scale": 5.0},
        {"fps": 25},
    ],
)
def test_each_parameter_changes_the_clip(model: Ltx, change: dict[str, Any]):
    assert not np.array_equal(frames_of(model, text(**change)), frames_of(model, text()))


# Equality with diffusers


def test_text_to_video_equals_diffusers(model: Ltx, folder: Path):
    assert furthest(frames_of(model, text()), own(folder)) <= 1


def test_image_to_video_equals_diffusers(model: Ltx, folder: Path, picture: Path):
    theirs = own(folder, conditions=[LTXVideoCondition(image=opened(picture), frame_index=0)])
    assert furthest(frames_of(model, image(picture)), theirs) <= 1


def test_first_and_last_frame_equal_diffusers(model: Ltx, folder: Path, picture: Path):
    places = [LTXVideoCondition(image=opened(picture), frame_index=n) for n in (0, 16)]
    theirs = own(folder, conditions=places, num_frames=17)
    assert furthest(frames_of(model, image(picture, picture, num_frames=17)), theirs) <= 1


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    """Equal within one step: diffusers converts pixels to 8 bits in bfloat16."""
    return int(np.abs(one.astype(int) - other).max())


def own(folder: Path, **changes: Any) -> np.ndarray:
    """The output of one call of diffusers' pipeline, which loads everything itself."""
    pipe = LTXConditionPipeline.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    params = {name: value for name, value in BASICS.items() if name not in ("seed", "fps")} | changes
    return np.stack(
        [
            np.asarray(frame)
            for frame in pipe(
                **params,
                frame_rate=BASICS["fps"],
                decode_timestep=ltx.DECODE_TIMESTEP,
                decode_noise_scale=ltx.DECODE_NOISE,
                generator=torch.Generator("cpu").manual_seed(BASICS["seed"]),
            ).frames[0]
        ]
    )


def opened(path: Path) -> Image.Image:
    with Image.open(path) as found:
        return found.convert("RGB")


def test_a_long_clip_is_decoded_in_pieces(model: Ltx, residency: Residency, monkeypatch: pytest.MonkeyPatch):
    whole = frames_of(model, text(num_frames=121, num_inference_steps=1))
    monkeypatch.setattr(ltx, "WHOLE_FRAMES", 100)
    pieces = frames_of(model, text(num_frames=121, num_inference_steps=1))
    assert pieces.shape == whole.shape
    assert furthest(pieces[:40], whole[:40]) <= 2
    assert furthest(pieces, whole) > 2
    vae = residency.acquire(video_weights_of(model._weights.folder).component("vae"), load_component)
    assert not vae.use_framewise_decoding


# Input


@pytest.mark.parametrize(("limit", "tokens"), [(512, 256), (128, 256), (24, 24)])
def test_prompts_are_padded_to_256_tokens_or_the_tokenizers_lower_limit(
    folder: Path, tmp_path: Path, residency: Residency, limit: int, tokens: int
):
    """128 is the published tokenizer's limit, which is ignored."""
    copy = shutil.copytree(folder, tmp_path / "ltx")
    tokenizer = load_small(copy, "tokenizer")
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(copy / "tokenizer")
    weights = video_weights_of(copy)
    seen = tokens_seen(residency.acquire(weights.component("text_encoder"), load_component))
    ltx.build(weights, residency).generate(text(num_frames=1, guidance_scale=1.0), ignore)
    assert seen == [(1, tokens)]


def tokens_seen(encoder: torch.nn.Module) -> list[tuple[int, int]]:
    """A list to which the shape of each later input is added."""
    seen: list[tuple[int, int]] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize(("added", "seen"), [(8, 17), (240, 17), (248, 9), (256, 1)])
def test_an_extension_is_conditioned_on_the_last_frames_within_the_trained_length(footage: Path, added: int, seen: int):
    start = ltx.from_video_end(extend(footage, num_frames=added))
    assert (start.overlap_frames, start.frames, start.continues) == (seen, seen + added, footage)
    (condition,) = start.conditions
    assert (len(condition.video), condition.frame_index, condition.strength) == (seen, 0, 1.0)
    assert np.abs(np.asarray(condition.video[-1]).astype(int) - boxes(30, 64, 32)[29]).mean() < 4


def test_a_short_video_is_extended_from_all_its_frames(model: Ltx, tmp_path: Path):
    short = write(tmp_path / "in.mp4", boxes(12, 64, 32), 24)
    assert ltx.from_video_end(extend(short)).overlap_frames == 9
    assert frames_of(model, extend(short)).shape[0] == 8


def test_a_reference_video_is_half_kept(model: Ltx, footage: Path):
    (condition,) = ltx.from_reference(reference(footage, num_frames=25)).conditions
    assert (len(condition.video), condition.strength) == (25, 0.5)
    assert not np.array_equal(frames_of(model, reference(footage)), frames_of(model, text()))


# Errors


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (text(width=48), "multiples of 32"),
        (text(num_frames=8), "multiple of 8, plus one"),
        (image(*[Path("a.png")] * 3), "takes 1 or 2 images, not 3"),
        (reference(None, Path("a.png")), "takes a video as its reference"),
        (extend(Path("a.mp4"), num_frames=9), "multiple of 8"),
    ],
)
def test_invalid_input_is_refused_before_anything_is_loaded(model: Ltx, residency, params, words: str):
    with pytest.raises(InvalidInput, match=words):
        model.generate(params, ignore)
    assert residency.resident() == ()


def test_files_that_cannot_be_read_are_refused(model: Ltx, tmp_path: Path):
    (path := tmp_path / "no").write_bytes(b"nothing")
    for params in (image(path), extend(path), reference(path)):
        with pytest.raises(InvalidInput):
            model.generate(params, ignore)


def test_an_index_that_names_another_class_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    weights = video_weights_of(folder)
    with pytest.raises(UnusableWeights, match=r"model_index\.json"):
        ltx.build(type(weights)("ltx", "ltx", tmp_path, weights.components), Residency("cpu"))


def test_progress_is_reported_by_phase(model: Ltx):
    steps_reported: Steps = []
    model.generate(text(), lambda *step: steps_reported.append(step))
    denoise = [("denoise", n, 3) for n in (1, 2, 3)]
    assert steps_reported == [("encode", 0, 1), ("encode", 1, 1), *denoise, ("decode", 0, 1), ("decode", 1, 1)]


@pytest.mark.parametrize("last", range(7))
def test_a_job_can_be_cancelled_at_every_step_without_affecting_the_next(model: Ltx, last: int):
    expected, steps_reported = frames_of(model, text()), []

    def cancel(*step: object) -> None:
        steps_reported.append(step)
        if len(steps_reported) > last:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        model.generate(text(prompt="a cat"), cancel)
    assert len(steps_reported) == last + 1
    assert np.array_equal(frames_of(model, text()), expected)


def test_nan_frames_are_an_error(folder: Path):
    residency = Residency("cpu")
    weights = video_weights_of(folder)
    residency.acquire(weights.component("transformer"), load_component).proj_out.bias.fill_(float("nan"))
    with pytest.raises(InvalidOutput):
        ltx.build(weights, residency).generate(text(), ignore)


def test_the_network_is_not_used(model: Ltx, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    model.generate(text(), ignore)


# Execution modes


@pytest.mark.parametrize(
    "mode", [ExecutionMode("staged"), ExecutionMode("streamed"), ExecutionMode("staged", tiled=True)]
)
def test_every_execution_mode_makes_the_same_clip(
    model: Ltx, folder: Path, residency: Residency, mode: ExecutionMode, footage: Path
):
    """Also with tiling, if the frame fits in one tile. The VAE's settings are restored afterwards."""
    expected = frames_of(model, extend(footage))
    residency.clear()
    keys = {part.name: part.key for part in video_weights_of(folder).components}
    phases = (
        ("encode", (keys["text_encoder"],)),
        ("denoise", (keys["transformer"], keys["vae"])),
        ("decode", (keys["vae"],)),
    )
    kept = ((keys["transformer"], 0),) if mode.tier == "streamed" else ()
    residency.begin_run(ExecutionMode(mode.tier, mode.tiled, phases, kept))
    clip = model.generate(extend(footage), lambda phase, step, steps: residency.enter_phase(phase))
    assert np.array_equal(clip.frames, expected)
    assert [key for key, _ in residency.resident()] == [keys["vae"]]
    assert not residency.acquire(video_weights_of(folder).component("vae"), load_component).use_tiling


def test_a_prompt_is_encoded_once(model: Ltx, residency: Residency, folder: Path):
    first = frames_of(model, text())
    residency.evict(video_weights_of(folder).component("text_encoder").key)
    assert np.array_equal(frames_of(model, text()), first)
    assert "text_encoder" not in {held.name for held in residency.component_statuses() if held.device_bytes}
