"""Pulls from a hub, by huggingface_hub's own client, against a stand-in on loopback."""

import hashlib
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

from pipelines.catalog.catalog import Source
from pipelines.weights.errors import Gated, HashMismatch, NotEnoughSpace, NotFound, Offline, PickleRefused, Unreachable
from pipelines.weights.install import Progress
from pipelines.weights.lock import Lock
from pipelines.weights.pull import pull
from pipelines.weights.verify import verify
from tests.support.hub import COMMIT, Hub, running
from tests.support.weights_samples import KEPT, a_model, flux_repo, tensors

ONE_FILE = "vae/diffusion_pytorch_model.safetensors"
MODEL = a_model()
BIG = a_model("big")


@pytest.fixture
def hub(monkeypatch):
    with running(Hub({"plantain/flux-test": flux_repo(10), "plantain/big": {ONE_FILE: tensors(1, 200_000)}})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _s: None)
        yield hub
        huggingface_hub.close_session()


def stop_at(done_bytes: int):
    def on_progress(progress: Progress) -> None:
        if progress.done_bytes > done_bytes:
            raise KeyboardInterrupt

    return on_progress


def test_a_pull_takes_what_is_loaded_and_nothing_else(hub: Hub, tmp_path: Path):
    told: list[Progress] = []
    pull(MODEL, tmp_path, on_progress=told.append)
    folder = tmp_path / MODEL.id
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == KEPT
    assert told[-1].done_bytes == told[-1].total_bytes == sum(len(flux_repo(10)[name]) for name in KEPT)
    assert verify(tmp_path) == []


def test_the_lock_records_commit_sizes_and_hashes(hub: Hub, tmp_path: Path):
    entry = pull(MODEL, tmp_path)
    assert Lock.read(tmp_path).models == {MODEL.id: entry}
    assert (entry.commit, entry.source["repo"]) == (COMMIT, "plantain/flux-test")
    content = flux_repo(10)["model_index.json"]
    record = entry.files["model_index.json"]
    assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_second_pull_asks_nobody(hub: Hub, tmp_path: Path):
    pull(MODEL, tmp_path)
    hub.asked.clear()
    pull(MODEL, tmp_path, offline=True)
    assert hub.asked == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path):
    hub.break_after = [300_000]
    pull(BIG, tmp_path)
    assert len(hub.asked_ranges()) > 0
    assert verify(tmp_path) == []


def test_an_interrupted_pull_goes_on_from_where_it_stopped(hub: Hub, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        pull(BIG, tmp_path, on_progress=stop_at(300_000))
    have = next((tmp_path / ".partial").rglob("*.part")).stat().st_size
    assert not (tmp_path / BIG.id).exists()
    assert have > 200_000
    pull(BIG, tmp_path)
    assert set(hub.asked_ranges()) == {f"bytes={have}-"}
    assert verify(tmp_path) == []
    assert not list((tmp_path / ".partial").glob(f"{BIG.id}@*"))


def test_a_finished_file_of_an_interrupted_pull_is_not_fetched_again(hub: Hub, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        pull(MODEL, tmp_path, on_progress=stop_at(30_000))
    finished = hub.fetched()[:-1]
    assert finished
    hub.asked.clear()
    pull(MODEL, tmp_path)
    assert not set(finished) & set(hub.fetched())
    assert verify(tmp_path) == []


def test_what_another_model_has_is_not_fetched_again(hub: Hub, tmp_path: Path):
    hub.repos["plantain/flux-other"] = flux_repo(20, saved_by="0.31")
    pull(MODEL, tmp_path)
    hub.asked.clear()
    pull(a_model("flux-other"), tmp_path)
    weights = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert weights == [name for name in KEPT if name.startswith("transformer/") and name.endswith(".safetensors")]
    assert (tmp_path / "flux-other" / ONE_FILE).samefile(tmp_path / MODEL.id / ONE_FILE)


def test_a_damaged_file_is_mended_by_pulling_again(hub: Hub, tmp_path: Path):
    pull(MODEL, tmp_path)
    (tmp_path / MODEL.id / ONE_FILE).unlink()
    hub.asked.clear()
    pull(MODEL, tmp_path)
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == [ONE_FILE]
    assert verify(tmp_path) == []


def test_a_file_with_another_hash_is_refused_and_thrown_away(hub: Hub, tmp_path: Path):
    hub.promised_sha256[ONE_FILE] = "f" * 64
    with pytest.raises(HashMismatch, match=ONE_FILE):
        pull(BIG, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors*"))
    assert Lock.read(tmp_path).models == {}


def test_a_gated_repository_says_how_to_get_access(hub: Hub, tmp_path: Path, monkeypatch):
    hub.gated = True
    with pytest.raises(Gated, match=f"{hub.endpoint}/plantain/flux-test.*HF_TOKEN"):
        pull(MODEL, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    pull(MODEL, tmp_path)


def test_the_disk_is_checked_before_anything_is_fetched(hub: Hub, tmp_path: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(2**20, 2**20, 2**19))
    with pytest.raises(NotEnoughSpace, match=r"big needs 0\.8 MiB more in .*0\.5 MiB are free\. Free 0\.3 MiB"):
        pull(BIG, tmp_path)
    assert hub.fetched() == []


def test_offline_names_the_way_without_a_network(hub: Hub, tmp_path: Path):
    with pytest.raises(Offline, match="plantain import"):
        pull(MODEL, tmp_path, offline=True)
    assert hub.asked == []


def test_a_repository_of_pickles_is_refused(hub: Hub, tmp_path: Path):
    hub.repos["plantain/old"] = {"unet/diffusion_pytorch_model.bin": b"\x80\x02}q\x00."}
    with pytest.raises(PickleRefused, match=r"diffusion_pytorch_model\.bin"):
        pull(a_model("old"), tmp_path)


def test_a_pickle_under_another_name_is_refused(hub: Hub, tmp_path: Path):
    hub.repos["plantain/sly"] = {"vae/model.safetensors": b"\x80\x02" + b"x" * 2000}
    with pytest.raises(PickleRefused, match="under another name"):
        pull(a_model("sly"), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_names_that_lead_out_of_the_folder_are_not_wanted(hub: Hub, tmp_path: Path):
    hub.repos["plantain/flux-test"]["../../outside.json"] = b"{}"
    assert "../../outside.json" not in pull(MODEL, tmp_path).files


def test_a_repository_that_does_not_exist(hub: Hub, tmp_path: Path):
    with pytest.raises(NotFound, match="plantain/none was not found"):
        pull(a_model("none"), tmp_path)


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match="HF_ENDPOINT"):
        pull(MODEL, tmp_path)
    huggingface_hub.close_session()


def test_two_pulls_at_once_fetch_once(hub: Hub, tmp_path: Path):
    with ThreadPoolExecutor(2) as pool:
        entries = list(pool.map(lambda _i: pull(MODEL, tmp_path), range(2)))
    assert entries[0] == entries[1]
    assert len(hub.fetched()) == len(KEPT)


def test_another_revision_is_other_weights(hub: Hub, tmp_path: Path):
    pull(MODEL, tmp_path)
    hub.repos["plantain/flux-test"] = flux_repo(30)
    entry = pull(a_model(weights=Source("hf", repo="plantain/flux-test", revision="v2")), tmp_path)
    assert Lock.read(tmp_path).models[MODEL.id] == entry
    assert "flux1.safetensors" in entry.files
    assert verify(tmp_path) == []
