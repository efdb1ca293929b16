"""Real-ESRGAN: seams, sizes, alpha; spandrel's own architectures with few features, and one starter network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN

from pipelines import realesrgan
from pipelines.base import Component, InvalidInput, InvalidOutput, JobCancelled, UnusableWeights
from pipelines.params import Upscale
from pipelines.realesrgan import Network, build, cut, cut_length, load, upscale
from pipelines.residency.residency import Residency
from tests.support.starter import single_file, starter

CHELSEA = Image.fromarray(data.chelsea())
CORNER = CHELSEA.crop((100, 60, 197, 135))
STRIP = CHELSEA.crop((100, 100, 360, 130))
NETWORKS = {
    "compact-4x": lambda: Compact(num_feat=8, num_conv=3, upscale=4),
    "rrdb-4x": lambda: ESRGAN(num_filters=8, num_blocks=1),
    "rrdb-2x-unshuffle": lambda: ESRGAN(num_filters=8, num_blocks=1, in_nc=12, shuffle_factor=2),
    "compact-2x": lambda: Compact(num_feat=8, num_conv=3, upscale=2),
}


def write_network(name: str, folder: Path) -> Path:
    """Random weights from a seed, their output moved to mid-grey so that little of it is clipped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = NETWORKS[name]()
    last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    if name.startswith("rrdb"):
        torch.nn.init.constant_(last.bias, 0.5)
        last.weight.data *= 8
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return {name: write_network(name, folder) for name in NETWORKS}


@pytest.fixture(scope="module")
def networks(files: dict[str, Path]) -> dict[str, Network]:
    return {name: load_file(path) for name, path in files.items()}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows, so that a small picture has many tiles."""
    monkeypatch.setattr(realesrgan, "WINDOW", {"cpu": 280})


def load_file(path: Path) -> Network:
    return load(single_file("any", "realesrgan", path).component("network"))


def run(network: Network, image: Image.Image, scale: int) -> np.ndarray:
    return np.asarray(upscale(network, image, scale, lambda *step: None)).astype(int)


def steps_of(network: Network, image: Image.Image, scale: int) -> list[tuple[str, int, int]]:
    steps: list[tuple[str, int, int]] = []
    upscale(network, image, scale, lambda *step: steps.append(step))
    return steps


def untiled(network: Network, image: Image.Image) -> np.ndarray:
    with torch.inference_mode():
        pixels = network(realesrgan.to_pixels(image, torch.device("cpu")))
    return np.asarray(realesrgan.to_image(pixels)).astype(int)


def with_alpha(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    """RGBA, black wherever nothing is visible, as most files are."""
    pixels = np.dstack([np.where(alpha[..., None] > 0, np.asarray(image), 0), alpha])
    return Image.fromarray(pixels.astype(np.uint8))


def disc(image: Image.Image, radius: int) -> np.ndarray:
    y, x = np.ogrid[: image.height, : image.width]
    return np.where(np.hypot(x - image.width // 2, y - image.height // 2) < radius, 255, 0)


# Tiles


@given(
    length=st.integers(1, 3000),
    context=st.integers(0, 40),
    kept=st.integers(1, 200),
    multiple=st.sampled_from([1, 4, 7]),
)
def test_tiles_follow_one_another_with_their_context_and_stay_inside(
    length: int, context: int, kept: int, multiple: int
) -> None:
    side = 2 * (context + multiple) + kept
    spans = cut_length(length, side, context, multiple)
    assert [0, *(span.last for span in spans)] == [*(span.first for span in spans), length]
    for span in spans:
        assert span.first < span.last
        assert span.first - span.start >= context or span.start == 0
        assert span.stop - span.last >= context or span.stop == length
        assert span.start % multiple == 0
        assert 0 <= span.start < span.stop <= length
        assert span.stop - span.start < side + 2 * multiple


def test_a_picture_that_fits_one_window_is_one_tile() -> None:
    assert [(tile.window, tile.kept) for tile in cut((400, 300), 512, 72)] == [((0, 0, 400, 300), (0, 0, 400, 300))]


# Seams


@pytest.mark.parametrize(
    ("name", "window"), [("compact-4x", 100), ("compact-2x", 100), ("rrdb-4x", 400), ("rrdb-2x-unshuffle", 400)]
)
def test_tiles_leave_no_seam(
    networks: dict[str, Network], name: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realesrgan, "WINDOW", {"cpu": window})
    network = networks[name]
    whole, tiles = untiled(network, STRIP), []
    enlarged = upscale(network, STRIP, network.scale, lambda *step: tiles.append(step))
    assert len(tiles) > 2
    assert whole.std() > 2
    assert np.abs(np.asarray(enlarged).astype(int) - whole).max() <= 1


@pytest.mark.usefixtures("small_windows")
def test_scale_2_of_a_network_of_scale_4_is_the_mean_of_two_by_two_pixels(networks: dict[str, Network]) -> None:
    whole = untiled(networks["compact-4x"], CORNER)
    mean = whole.reshape(CORNER.height * 2, 2, CORNER.width * 2, 2, 3).mean((1, 3))
    assert np.abs(run(networks["compact-4x"], CORNER, 2) - mean).max() <= 1


def test_context_is_the_receptive_field_with_an_upper_limit(networks: dict[str, Network]) -> None:
    assert networks["compact-4x"].context == 5
    assert load_file(starter("realesr-animevideov3")).context == 18
    assert load_file(starter("realesrgan-x4plus")).context == realesrgan.CONTEXT // 4


@pytest.mark.usefixtures("small_windows")
def test_a_real_photo_has_no_seam_and_keeps_its_content() -> None:
    network, photo = load_file(starter("realesr-animevideov3")), CORNER
    enlarged = run(network, photo, 4)
    assert np.abs(enlarged - untiled(network, photo)).max() <= 1
    again = enlarged.reshape(photo.height, 4, photo.width, 4, 3).mean((1, 3))
    assert 10 * np.log10(255**2 / ((again - np.asarray(photo)) ** 2).mean()) > 28


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 200), (200, 2)])
@pytest.mark.parametrize("name", ["rrdb-4x", "rrdb-2x-unshuffle", "compact-4x"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_any_size_is_doubled(networks: dict[str, Network], name: str, size: tuple[int, int], mode: str) -> None:
    image = CHELSEA.resize(size).convert(mode)
    enlarged = upscale(networks[name], image, 2, lambda *step: None)
    assert (enlarged.size, enlarged.mode) == ((size[0] * 2, size[1] * 2), mode)


@pytest.mark.parametrize("name", ["compact-2x", "rrdb-2x-unshuffle"])
def test_a_network_of_scale_2_cannot_enlarge_four_times(networks: dict[str, Network], name: str) -> None:
    with pytest.raises(InvalidInput, match="enlarges 2 times; it cannot enlarge 4 times"):
        run(networks[name], CORNER, 4)


# Alpha


def test_opaque_alpha_stays_and_changes_no_colour(networks: dict[str, Network]) -> None:
    enlarged = run(networks["compact-4x"], CORNER.convert("RGBA"), 4)
    assert (enlarged[..., 3] == 255).all()
    assert (enlarged[..., :3] == run(networks["compact-4x"], CORNER, 4)).all()


def test_opaque_and_empty_areas_stay_exactly_so() -> None:
    alpha = disc(CORNER, 25)
    enlarged = run(load_file(starter("realesr-animevideov3")), with_alpha(CORNER, alpha), 4)[..., 3]
    inside, outside = disc(CORNER, 22) == 255, disc(CORNER, 28) == 0
    assert (enlarged[inside.repeat(4, 0).repeat(4, 1)] == 255).all()
    assert (enlarged[outside.repeat(4, 0).repeat(4, 1)] == 0).all()
    assert abs(enlarged.mean() - alpha.mean()) < 1


def test_hidden_black_makes_no_dark_fringe() -> None:
    network, white = load_file(starter("realesr-animevideov3")), Image.new("RGB", CORNER.size, (230, 230, 230))
    enlarged = run(network, with_alpha(white, disc(white, 25)), 4)
    visible = enlarged[enlarged[..., 3] > 0]
    assert visible[:, :3].min() >= 225


def test_an_empty_picture_stays_empty(networks: dict[str, Network]) -> None:
    assert not run(networks["compact-4x"], Image.new("RGBA", (20, 10)), 2).any()


# Runs


@pytest.mark.usefixtures("small_windows")
def test_each_tile_is_a_step_at_which_a_job_can_be_cancelled(networks: dict[str, Network]) -> None:
    steps = steps_of(networks["compact-4x"], CORNER, 4)
    assert steps == [("upscale", number, len(steps)) for number in range(1, len(steps) + 1)]

    def cancel(phase: str, step: int, steps: int) -> None:
        if step == 2:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        upscale(networks["compact-4x"], CORNER, 4, cancel)


def test_a_run_from_file_to_picture_loads_the_network_once(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Component] = []
    monkeypatch.setattr(realesrgan, "load", lambda component: loaded.append(component) or load(component))
    CORNER.save(tmp_path / "corner.png")
    pipeline = build(single_file("rrdb", "realesrgan", files["rrdb-4x"]), Residency("cpu"))
    params = Upscale(image=tmp_path / "corner.png", scale=2)
    first, second = (pipeline.generate(params, lambda *step: None) for _ in range(2))
    assert first.size == (194, 150)
    assert first.tobytes() == second.tobytes()
    assert len(loaded) == 1


def test_nan_pixels_are_an_error(networks: dict[str, Network]) -> None:
    with pytest.raises(InvalidOutput):
        realesrgan.to_image(torch.full((1, 3, 2, 2), torch.nan))


@pytest.mark.parametrize(
    "tensors", [{"weight": torch.ones(3)}, Compact(num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=1).state_dict()]
)
def test_weights_of_another_kind_are_refused(tensors: dict[str, Any], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UnusableWeights, match=r"other\.safetensors"):
        load_file(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"x" * 1000])
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UnusableWeights, match=r"bad\.safetensors"):
        load_file(tmp_path / "bad.safetensors")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_on_cuda_differs_little_from_the_cpu(tmp_path: Path) -> None:
    CORNER.save(tmp_path / "corner.png")
    weights = single_file("x4plus", "realesrgan", starter("realesrgan-x4plus"))
    params = Upscale(image=tmp_path / "corner.png", scale=4)
    on_cpu, on_cuda = (
        np.asarray(build(weights, Residency(device)).generate(params, lambda *step: None)).astype(int)
        for device in ("cpu", "cuda")
    )
    assert 10 * np.log10(255**2 / ((on_cpu - on_cuda) ** 2).mean()) > 45
