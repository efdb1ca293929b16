"""Pulls from a plain URL, from a wheel by pip, and in place; each looked at where it differs from the hub's."""

import hashlib
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from pipelines.catalog.catalog import Source
from pipelines.weights import url
from pipelines.weights.errors import Damaged, HashMismatch, NotFound, Offline, PickleRefused, Unreachable
from pipelines.weights.lock import FileRecord, Lock
from pipelines.weights.pull import pull
from pipelines.weights.verify import Problem, verify
from tests.support.hub import Hub, running
from tests.support.weights_samples import KEPT, a_model, flux_repo, tensors, write_folder

ONNX = b"\x08\x07" + bytes(range(256)) * 4000


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(url, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(url, "CHUNK_BYTES", 1 << 16)
    with running(Hub(plain={"cutter.onnx": ONNX})) as hub:
        yield hub


def cutter(hub: Hub, name: str = "cutter.onnx", md5: str = "") -> Source:
    return Source("url", url=f"{hub.endpoint}/{name}", md5=md5 or hashlib.md5(ONNX).hexdigest())


def test_a_url_gives_one_file_named_after_the_model(hub: Hub, tmp_path: Path):
    entry = pull(a_model("u2net-test", cutter(hub)), tmp_path)
    assert entry.files == {"u2net-test.onnx": FileRecord(len(ONNX), hashlib.sha256(ONNX).hexdigest())}
    assert (tmp_path / "u2net-test" / "u2net-test.onnx").read_bytes() == ONNX


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_from_there_or_begins_again(hub: Hub, tmp_path: Path, ranges: bool):
    hub.break_after, hub.ranges = [400_000], ranges
    pull(a_model(weights=cutter(hub)), tmp_path)
    assert hub.asked_ranges()
    assert verify(tmp_path) == []


def test_a_url_that_keeps_breaking_keeps_what_came(hub: Hub, tmp_path: Path):
    hub.break_after = [200_000] * 3
    with pytest.raises(Unreachable, match="goes on from where it stopped"):
        pull(a_model(weights=cutter(hub)), tmp_path)
    hub.asked.clear()
    pull(a_model(weights=cutter(hub)), tmp_path)
    assert int(hub.asked_ranges()[0].strip("bytes=-")) > 500_000


def test_a_url_with_another_hash(hub: Hub, tmp_path: Path):
    with pytest.raises(HashMismatch, match="its md5 is"):
        pull(a_model(weights=cutter(hub, md5="0" * 32)), tmp_path)
    assert not list(tmp_path.rglob("*.onnx*"))


def test_a_url_that_is_gone(hub: Hub, tmp_path: Path):
    with pytest.raises(NotFound, match="404"):
        pull(a_model(weights=cutter(hub, "gone.onnx")), tmp_path)


def test_a_url_of_a_pickle_is_refused_unasked(hub: Hub, tmp_path: Path):
    with pytest.raises(PickleRefused, match=r"RealESRGAN\.pth"):
        pull(a_model(weights=cutter(hub, "RealESRGAN.pth")), tmp_path)
    assert hub.asked == []


INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: plantain-sample\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}
"""All that pip wants of a wheel that it only downloads."""


def make_wheel(folder: Path, members: dict[str, bytes]) -> None:
    with ZipFile(folder / "plantain_sample-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        for name, text in INFO.items():
            wheel.writestr(f"plantain_sample-1.0.dist-info/{name}", text)


def sample(sha256: str) -> Source:
    members = {"sample/cutter.onnx": sha256}
    return Source("pypi", package="plantain-sample", version="1.0", members=members, sha256=sha256)


@pytest.fixture
def index(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_a_member_of_a_wheel_is_installed_under_the_models_name(index: Path, tmp_path: Path):
    make_wheel(index, {"sample/cutter.onnx": ONNX})
    pull(a_model("cutter", sample(hashlib.sha256(ONNX).hexdigest())), tmp_path / "weights")
    assert (tmp_path / "weights" / "cutter" / "cutter.onnx").read_bytes() == ONNX
    assert "plantain_sample" not in sys.modules


def test_a_wheel_with_another_member_is_refused(index: Path, tmp_path: Path):
    make_wheel(index, {"sample/cutter.onnx": ONNX + b"more"})
    with pytest.raises(HashMismatch, match=r"sample/cutter\.onnx"):
        pull(a_model("cutter", sample(hashlib.sha256(ONNX).hexdigest())), tmp_path / "weights")


def test_a_wheel_that_pip_cannot_find(index: Path, tmp_path: Path):
    with pytest.raises(Unreachable, match=r"pip could not download plantain-sample==1\.0: ERROR: No matching"):
        pull(a_model("cutter", sample("0" * 64)), tmp_path / "weights")


def test_a_folder_is_used_in_place(tmp_path: Path):
    folder = write_folder(tmp_path / "studio", flux_repo(10))
    model = a_model(weights=Source("path", path=str(folder)))
    entry = pull(model, tmp_path / "weights", offline=True)
    assert sorted(entry.files) == sorted([*KEPT, "flux1.safetensors"])
    assert entry.path(tmp_path / "weights") == folder
    (folder / "vae" / "config.json").write_bytes(b"{}")
    assert verify(tmp_path / "weights") == [Problem(model.id, folder / "vae" / "config.json", "size")]


def test_a_file_is_used_in_place(tmp_path: Path):
    write_folder(tmp_path, {"weights/mine/4x.safetensors": tensors(5), "weights/mine/other.safetensors": tensors(6)})
    entry = pull(a_model("mine", Source("path", path="mine/4x.safetensors")), tmp_path / "weights")
    assert list(entry.files) == ["4x.safetensors"]
    assert Lock.read(tmp_path / "weights").models["mine"].intact(tmp_path / "weights")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("4x.pth", b"PK\x03\x04", PickleRefused),
        ("4x.safetensors", b"PK\x03\x04rest of a zip", PickleRefused),
        ("4x.safetensors", tensors(1)[:-1], Damaged),
        ("4x.safetensors", b"{}", Damaged),
        ("4x.onnx", b"<html>", Damaged),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path: Path, name: str, content: bytes, error: type[Exception]):
    write_folder(tmp_path, {name: content})
    with pytest.raises(error):
        pull(a_model(weights=Source("path", path=str(tmp_path / name))), tmp_path / "weights")


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(NotFound, match="There is no"):
        pull(a_model(weights=Source("path", path="nowhere")), tmp_path)


def test_offline_no_url_is_asked(hub: Hub, tmp_path: Path):
    with pytest.raises(Offline):
        pull(a_model(weights=cutter(hub)), tmp_path, offline=True)
    assert hub.asked == []
