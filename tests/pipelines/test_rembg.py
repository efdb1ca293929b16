"""Background removal: the output of rembg itself, from a local file, with one session per model."""

from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from PIL import Image
from skimage import data

from pipelines import rembg as family
from pipelines.base import InvalidInput, UnusableWeights
from pipelines.params import RemoveBackground
from pipelines.rembg import Rembg, build, open_session, rembg, sessions
from pipelines.residency.residency import Residency
from tests.support.starter import single_file, starter

ASTRONAUT = Image.fromarray(data.astronaut()).resize((256, 256))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def residency() -> Residency:
    return Residency("cpu")


@pytest.fixture
def pipeline(residency: Residency) -> Rembg:
    return build(single_file("u2netp", "rembg", starter("u2netp")), residency)


def cut_out(pipeline: Rembg, image: Image.Image, folder: Path) -> Image.Image:
    image.save(folder / "picture.png")
    return pipeline.generate(RemoveBackground(image=folder / "picture.png"), lambda *step: None)


def test_the_cutout_equals_rembgs(pipeline: Rembg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("U2NET_HOME", str(starter("u2netp").parent))
    own = rembg.remove(ASTRONAUT, session=rembg.new_session("u2netp", providers=["CPUExecutionProvider"]))
    cutout = cut_out(pipeline, ASTRONAUT, tmp_path)
    assert (cutout.mode, cutout.size) == ("RGBA", ASTRONAUT.size)
    assert cutout.tobytes() == own.tobytes()


def test_the_astronaut_stays_and_the_flag_goes(pipeline: Rembg, tmp_path: Path) -> None:
    alpha = np.asarray(cut_out(pipeline, ASTRONAUT, tmp_path).getchannel("A"))
    face, flag = alpha[40:70, 100:125], alpha[:60, :40]
    assert face.min() > 240
    assert flag.max() < 15


def test_alpha_of_the_input_is_kept(pipeline: Rembg, tmp_path: Path) -> None:
    opaque = np.asarray(cut_out(pipeline, ASTRONAUT, tmp_path).getchannel("A")).astype(int)
    half = ASTRONAUT.copy()
    half.putalpha(128)
    alpha = np.asarray(cut_out(pipeline, half, tmp_path).getchannel("A")).astype(int)
    assert np.abs(alpha - opaque * 128 / 255).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 300), (700, 2)])
def test_the_size_is_kept(pipeline: Rembg, size: tuple[int, int], tmp_path: Path) -> None:
    cutout = cut_out(pipeline, ASTRONAUT.resize(size), tmp_path)
    assert (cutout.mode, cutout.size) == ("RGBA", size)


def test_the_start_and_end_are_reported_as_steps(pipeline: Rembg, tmp_path: Path) -> None:
    ASTRONAUT.save(tmp_path / "picture.png")
    steps: list[tuple[str, int, int]] = []
    pipeline.generate(RemoveBackground(image=tmp_path / "picture.png"), lambda *step: steps.append(step))
    assert steps == [("remove-bg", 0, 1), ("remove-bg", 1, 1)]


def test_a_file_that_is_not_a_picture_is_an_error_of_the_caller(pipeline: Rembg, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("no picture")
    with pytest.raises(InvalidInput):
        pipeline.generate(RemoveBackground(image=tmp_path / "picture.png"), lambda *step: None)


def test_the_session_is_opened_once_until_it_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(family, "open_session", lambda *given: opened.append(given[0]) or open_session(*given))
    weights, residency = single_file("u2netp", "rembg", starter("u2netp")), Residency("cpu")
    pipeline = build(weights, residency)
    first, second = (cut_out(pipeline, ASTRONAUT, tmp_path) for _ in range(2))
    assert len(opened) == 1
    assert first.tobytes() == second.tobytes()
    residency.evict(weights.component("network").key)
    cut_out(pipeline, ASTRONAUT, tmp_path)
    assert len(opened) == 2


# Sessions


@pytest.mark.parametrize("name", ["u2netp", "u2net", "isnet-general-use", "birefnet-general", "silueta"])
def test_the_models_name_picks_rembgs_own_session(name: str) -> None:
    session = open_session(name, starter("u2netp"), CPU)
    assert isinstance(session, sessions[name])
    assert session.inner_session.get_providers() == ["CPUExecutionProvider"]


def test_nothing_is_downloaded_or_written_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("rembg asked for a download")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    for variable in ("HOME", "XDG_DATA_HOME", "REMBG_HOME", "U2NET_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    open_session("u2netp", starter("u2netp"), CPU)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_sets_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert family.session_options().intra_op_num_threads == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert family.session_options().intra_op_num_threads == 0


def test_a_model_that_rembg_does_not_have_is_refused() -> None:
    with pytest.raises(UnusableWeights, match=r"has no model u3net; it has .*u2netp"):
        open_session("u3net", starter("u2netp"), CPU)


@pytest.mark.parametrize("length", [0, 100, 2_000_000])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(starter("u2netp").read_bytes()[:length])
    with pytest.raises(UnusableWeights, match=r"bad\.onnx"):
        open_session("u2netp", tmp_path / "bad.onnx", CPU)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableWeights, match=r"none\.onnx"):
        open_session("u2netp", tmp_path / "none.onnx", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_makes_the_cutout_of_the_cpu(pipeline: Rembg, tmp_path: Path) -> None:
    on_cuda = build(single_file("u2netp", "rembg", starter("u2netp")), Residency("cuda"))
    masks = [np.asarray(cut_out(each, ASTRONAUT, tmp_path).getchannel("A")).astype(int) for each in (pipeline, on_cuda)]
    assert np.abs(masks[0] - masks[1]).max() <= 3
    session = open_session("u2netp", starter("u2netp"), torch.device("cuda"))
    assert session.inner_session.get_providers()[0] == "CUDAExecutionProvider"
