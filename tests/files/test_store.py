"""Files under unguessable names: written whole or not at all, served in ranges, swept when nobody knows of them."""

import errno
import io
import os
import re
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

from server.api.errors import hosted_envelope
from server.errors import NotFound, PlantainError, StorageFull
from server.files.store import FileStore

CONTENT = bytes(range(256)) * 1_000


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def contents(files: FileStore) -> set[str]:
    return {path.name for path in files.root.iterdir()}


# Names and URLs


def test_names_are_unguessable_and_safe_everywhere(files):
    names = {files.new_name(".png") for _ in range(1_000)}
    assert len(names) == 1_000
    assert all(re.fullmatch(r"[0-9a-f]{48}\.png", name) for name in names)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a.png", "../plantain.sqlite", "..%2fx", f"../{'a' * 48}.png", f"{'a' * 48}.png/..",
     f"{'a' * 48}.png\n", f"{'a' * 48}.exe", f"{'a' * 48}", f".{'a' * 48}.part", f"{'A' * 48}.png", f"{'٣' * 48}.png"],
)  # fmt: skip
def test_only_well_formed_names_have_a_path(files, name):
    for use in (files.path, files.delete, files.response):
        with pytest.raises(NotFound):
            use(name)
    assert files.name_in(f"/files/{name}", []) is None


def test_own_urls_are_known_by_the_bases(files):
    name = files.new_name(".png")
    bases = ["http://127.0.0.1:8000", "https://plantain.example/studio/"]
    ours = [
        files.url(name, bases[0]),
        files.url(name, bases[1]),
        f"/files/{name}",
        f"HTTPS://Plantain.Example:443/studio/files/{name}?download=1#top",
    ]
    assert ours[1] == f"https://plantain.example/studio/files/{name}"
    assert [files.name_in(url, bases) for url in ours] == [name] * 4


@pytest.mark.parametrize(
    "url",
    ["http://other.example/files/{}", "http://127.0.0.1:9000/files/{}", "https://plantain.example/files/{}",
     "https://plantain.example@other.example/studio/files/{}", "http://127.0.0.1:8000/files/../{}", "{}",
     "http://127.0.0.1:8000/files/x/{}", "file:///files/{}", "http://[bad/files/{}", "//127.0.0.1:8000/files/{}"],
)  # fmt: skip
def test_other_urls_are_not_ours(files, url):
    bases = ["http://127.0.0.1:8000", "https://plantain.example/studio"]
    assert files.name_in(url.format(files.new_name(".png")), bases) is None


# Writing and deleting


def test_bytes_and_streams_are_stored_whole(files):
    for content in (CONTENT, io.BytesIO(CONTENT)):
        name = files.write(content, ".mp4")
        assert files.path(name).read_bytes() == CONTENT
        files.delete(name)
        files.delete(name)
    assert contents(files) == set()


def test_a_draft_that_is_not_kept_leaves_nothing(files):
    with files.draft() as draft:
        draft.write(CONTENT)
        assert [name.startswith(".") for name in contents(files)] == [True]
    with pytest.raises(KeyboardInterrupt), files.draft() as draft:
        draft.write(CONTENT)
        raise KeyboardInterrupt
    assert contents(files) == set()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_so_and_leaves_nothing(files, monkeypatch, code):
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageFull, match="disk is full"):
        files.write(CONTENT, ".png")
    assert contents(files) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_while_writing_is_said_so(files, monkeypatch):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda _, mode: opened(Path("/dev/full"), mode))
    with pytest.raises(StorageFull):
        files.write(CONTENT, ".png")


def test_a_sweep_deletes_old_strays_and_nothing_else(files):
    known, stray, new = (files.write(b"x", ".png") for _ in range(3))
    (files.root / ".0123.part").write_bytes(b"half")
    (files.root / "README").write_bytes(b"an operator's own")
    for path in files.root.iterdir():
        if path.name != new:
            os.utime(path, (0, 0))
    assert set(files.sweep({known}, older_than_s=3_600)) == {stray, ".0123.part"}
    assert contents(files) == {known, new, "README"}


# Serving


@pytest.fixture
def client(files):
    app = FastAPI()

    @app.api_route("/files/{name}", methods=["GET", "HEAD"])
    async def read_file(name: str):
        return files.response(name)

    @app.exception_handler(PlantainError)
    async def answer(request: Request, error: PlantainError) -> JSONResponse:
        return JSONResponse(hosted_envelope(error, "req_1"), error.status, error.headers)

    with TestClient(app) as client:
        yield client


def test_a_file_is_served_with_its_type_and_kept_by_caches(files, client):
    answer = client.get(f"/files/{(name := files.write(CONTENT, '.mp4'))}")
    assert (answer.status_code, answer.content) == (200, CONTENT)
    expected = {
        "content-type": "video/mp4",
        "content-length": "256000",
        "accept-ranges": "bytes",
        "cache-control": "public, max-age=31536000, immutable",
        "content-disposition": f'inline; filename="{name}"',
        "content-security-policy": "sandbox; default-src 'none'",
        "cross-origin-resource-policy": "cross-origin",
        "x-content-type-options": "nosniff",
    }
    assert expected.items() <= dict(answer.headers).items()
    assert answer.headers["etag"] and answer.headers["last-modified"]


def test_head_tells_the_same_without_the_file(files, client):
    url = f"/files/{files.write(CONTENT, '.png')}"
    head, get = client.head(url), client.get(url)
    assert (head.status_code, head.content, head.headers) == (200, b"", get.headers)


@pytest.mark.parametrize(
    ("asked", "range", "content"),
    [("bytes=0-99", "bytes 0-99/256000", CONTENT[:100]), ("bytes=255990-", "bytes 255990-255999/256000", CONTENT[-10:]),
     ("bytes=-5", "bytes 255995-255999/256000", CONTENT[-5:])],
)  # fmt: skip
def test_one_range(files, client, asked, range, content):
    answer = client.get(f"/files/{files.write(CONTENT, '.mp4')}", headers={"Range": asked})
    assert (answer.status_code, answer.headers["content-range"], answer.content) == (206, range, content)


def test_several_ranges_come_as_parts(files, client):
    answer = client.get(f"/files/{files.write(CONTENT, '.mp4')}", headers={"Range": "bytes=0-1,10-12"})
    assert answer.status_code == 206
    assert answer.headers["content-type"].startswith("multipart/byteranges; boundary=")
    assert b"bytes 0-1/256000\r\n\r\n\x00\x01\r\n" in answer.content
    assert b"bytes 10-12/256000\r\n\r\n\x0a\x0b\x0c\r\n" in answer.content
    assert len(answer.content) == int(answer.headers["content-length"])


def test_a_range_of_another_version_is_the_whole_file(files, client):
    url = f"/files/{files.write(CONTENT, '.mp4')}"
    answer = client.get(url, headers={"Range": "bytes=0-1", "If-Range": '"another"'})
    assert (answer.status_code, len(answer.content)) == (200, 256_000)
    same = client.get(url, headers={"Range": "bytes=0-1", "If-Range": answer.headers["etag"]})
    assert same.status_code == 206


def test_a_range_beyond_the_end_is_refused(files, client):
    answer = client.get(f"/files/{files.write(CONTENT, '.mp4')}", headers={"Range": "bytes=256000-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */256000")


@pytest.mark.parametrize("name", ["a" * 48 + ".png", "plantain.sqlite", "..%2f..%2fetc%2fpasswd", "%2e%2e"])
def test_what_is_not_there_is_not_found(client, name):
    assert client.get(f"/files/{name}").status_code == 404
    assert client.head(f"/files/{name}").status_code == 404
