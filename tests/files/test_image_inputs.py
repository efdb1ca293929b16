"""Images by URL and upload, over real sockets on loopback: what is taken, what is refused, and that nothing is left."""

import asyncio
import base64
import gzip
import io
import struct
import sys
import zlib
from pathlib import Path
from urllib.parse import quote

import anyio
import httpx
import pytest
import skimage.data
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from pipelines.media.images import ImageInfo
from server.api.errors import hosted_envelope
from server.errors import InvalidMedia, MediaUnreachable, PlantainError, StorageFull, TooLarge
from server.files.decoders import ImageDecoders
from server.files.fetch import Limits
from server.files.inputs import IMAGE, InputFiles, StoredFile, StoredImage
from server.files.store import FileStore
from tests.support.http import LOOPBACK, Web, is_stored, refused

pytestmark = pytest.mark.anyio

MIB = 2**20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def shared_decoders() -> ImageDecoders:
    return ImageDecoders()


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo() -> bytes:
    return encoded(Image.fromarray(skimage.data.chelsea()))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


BOMB = b"\x89PNG\r\n\x1a\n" + (
    chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(1_000)))
    + chunk(b"IEND", b"")
)


@pytest.fixture
async def web():
    async with Web().running() as web:
        yield web


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


@pytest.fixture
def media(files: FileStore, shared_decoders: ImageDecoders) -> InputFiles:
    return InputFiles(
        files, offline=False, allowed_networks=LOOPBACK, limits=Limits(fetch_s=5), decoders=shared_decoders
    )


# Taken


async def test_an_image_is_fetched_and_stored_as_it_is(web, media, photo):
    image = await media.from_url(IMAGE, web.answer("/cat.png", photo), [])
    assert image == StoredFile(image.name, ImageInfo("png", "image/png", 451, 300, False), len(photo), is_new=True)
    assert image.name.endswith(".png") and is_stored(media, image, photo)
    assert "accept-encoding: identity" in web.requests[0].lower()


@pytest.mark.parametrize(("format", "suffix"), [("JPEG", ".jpg"), ("TIFF", ".tiff"), ("WEBP", ".webp")])
async def test_the_name_is_by_the_content_whatever_the_server_says(web, media, format, suffix):
    content = encoded(Image.new("RGB", (8, 8)), format)
    image = await media.from_url(IMAGE, web.answer("/x.png", content, Content_Type="text/html"), [])
    assert image.name.endswith(suffix)


async def test_few_redirects_are_followed(web, media, photo):
    web.answer("/cat.png", photo)
    web.redirect("/2", "/cat.png")
    web.redirect("/1", f"{web.url}/2")
    assert is_stored(media, await media.from_url(IMAGE, web.redirect("/0", "/1"), []), photo)
    await refused_after_one(media, web.redirect("/-1", "/0"))


async def refused_after_one(media: InputFiles, url: str) -> None:
    with pytest.raises(MediaUnreachable, match="more than 3 times"):
        await media.from_url(IMAGE, url, [])
    assert len(list(media.files.root.iterdir())) == 1


async def test_without_a_length_and_in_chunks(web, media, photo):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (photo[:1000], photo[1000:])) + b"0\r\n\r\n"
    for url in (
        web.answer("/open", photo, Content_Length=""),
        web.answer("/chunked", chunks, Content_Length="", Transfer_Encoding="chunked"),
    ):
        image = await media.from_url(IMAGE, url, [])
        assert is_stored(media, image, photo)
        media.files.delete(image.name)


async def test_gzip_that_nobody_asked_for_is_unpacked(web, media, photo):
    image = await media.from_url(IMAGE, web.answer("/cat.png", gzip.compress(photo), Content_Encoding="gzip"), [])
    assert is_stored(media, image, photo)


async def test_data_urls(media, photo):
    packed = base64.b64encode(photo).decode()
    for url in (
        f"data:image/png;base64,{packed}",
        f"DATA:;BASE64,{quote(packed, safe='')}",
        f"data:text/plain;charset=utf-8;base64,{packed}",
        f"data:image/png,{quote(photo)}",
    ):
        image = await media.from_url(IMAGE, url, [])
        assert is_stored(media, image, photo)
        media.files.delete(image.name)


async def test_own_urls_need_no_network_and_no_copy(files, photo):
    offline = InputFiles(files, offline=True)
    name = files.write(photo, ".png")
    for url in (f"/files/{name}", f"http://plantain.example/files/{name}"):
        image = await offline.from_url(IMAGE, url, ["http://plantain.example"])
        assert image == StoredFile(name, ImageInfo("png", "image/png", 451, 300, False), len(photo), is_new=False)
    assert [path.name for path in files.root.iterdir()] == [name]


async def test_own_urls_of_nothing_or_of_no_image(media):
    await refused(media, f"/files/{media.files.new_name('.png')}", MediaUnreachable, "no such file")
    name = media.files.write(b"a video", ".mp4")
    with pytest.raises(InvalidMedia):
        await media.from_url(IMAGE, f"/files/{name}", [])
    assert media.files.path(name).exists()


# Refused: what was fetched


async def test_no_image(web, media):
    await refused(media, web.answer("/", b"<html>"), InvalidMedia, "not an image")
    await refused(media, web.answer("/", b""), InvalidMedia, "not an image")


async def test_a_broken_image(web, media, photo):
    await refused(media, web.answer("/", photo[:-5000]), InvalidMedia, "truncated")


async def test_an_image_bomb(web, media):
    await refused(media, web.answer("/", BOMB), InvalidMedia, "more pixels")


async def test_too_large_by_its_declared_length(web, media):
    declared = web.answer("/", b"", Content_Length=str(32 * MIB + 1))
    await refused(media, declared, TooLarge, "larger than the 32 MiB")


async def test_too_large_without_a_declared_length(web, media):
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(MIB))
            await writer.drain()
            sent += 1

    await refused(media, web.page("/", endless), TooLarge, "larger than the 32 MiB")
    assert 32 <= sent < 48


async def test_too_large_once_unpacked(web, media):
    packed = gzip.compress(bytes(33 * MIB))
    await refused(media, web.answer("/", packed, Content_Encoding="gzip"), TooLarge)


async def test_other_encodings(web, media, photo):
    await refused(media, web.answer("/", photo, Content_Encoding="br"), MediaUnreachable, "encoding 'br'")
    await refused(media, web.answer("/", photo, Content_Encoding="gzip"), MediaUnreachable, "is not")


async def test_bad_data_urls(media, photo):
    packed = base64.b64encode(photo).decode()
    for url in ("data:", "data:image/png;base64", f"data:;base64,{packed[:-3]}!", f"data:;base64,{packed[:-1]}",
                f"data:;base64,{packed[:40]} {packed[40:]}", "data:,%zz", "data:,ü"):  # fmt: skip
        await refused(media, url, InvalidMedia, "data: URL")
    await refused(media, "data:,", InvalidMedia, "not an image")
    await refused(media, f"data:;base64,{'A' * 45 * MIB}", TooLarge)


# Refused: what could not be fetched


async def test_a_server_that_is_not_there(web, media):
    async with Web().running() as gone:
        url = gone.url
    await refused(media, url, MediaUnreachable, "could not be fetched")


async def test_errors_and_nonsense(web, media):
    await refused(media, web.answer("/", b"", "404 Not Found"), MediaUnreachable, "127.0.0.1 answered 404")

    async def nonsense(writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.7\r\n")

    await refused(media, web.page("/", nonsense), MediaUnreachable)
    await refused(media, web.answer("/", b"half", Content_Length="100"), MediaUnreachable)


async def test_a_server_that_never_answers_or_drips(web, files):
    media = InputFiles(files, offline=False, allowed_networks=LOOPBACK, limits=Limits(fetch_s=0.5))

    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2)

    async def dripping(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n\x89PNG")
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    for page in (silent, dripping):
        with anyio.fail_after(1.5):
            await refused(media, web.page("/", page), MediaUnreachable, "in time")


async def test_a_name_that_does_not_exist(files):
    async def resolve(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    media = InputFiles(files, offline=False, resolve=resolve)
    await refused(media, "https://nowhere.example/cat.png", MediaUnreachable, "host nowhere.example was not found")


async def test_a_cancelled_request_leaves_nothing(web, media):
    arrived = anyio.Event()

    async def stalls(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MIB))
        await writer.drain()
        arrived.set()
        await asyncio.sleep(1)

    async with anyio.create_task_group() as group:
        group.start_soon(media.from_url, IMAGE, web.page("/", stalls), [])
        await arrived.wait()
        group.cancel_scope.cancel()
    assert list(media.files.root.iterdir()) == []


def decoders(program: str, timeout_s: float = 20.0) -> ImageDecoders:
    return ImageDecoders(timeout_s=timeout_s, command=(sys.executable, "-c", program))


async def test_an_image_that_takes_too_long_or_crashes_its_decoder(files, photo):
    hanging, crashing = decoders("import time; time.sleep(60)", timeout_s=0.5), decoders("import os; os.abort()")
    await refused(InputFiles(files, offline=True, decoders=hanging), f"data:,{quote(photo)}", InvalidMedia, "too long")
    await refused(
        InputFiles(files, offline=True, decoders=crashing), f"data:,{quote(photo)}", InvalidMedia, "cannot be"
    )


async def test_a_decoder_that_died_is_replaced(files, photo, tmp_path):
    """The first one dies at once, those after it live."""
    once = f"""
import pathlib, runpy
first = pathlib.Path({str(tmp_path / "first")!r})
if first.exists():
    runpy.run_module("pipelines.media.decoder", run_name="__main__")
first.touch()"""
    media = InputFiles(files, offline=True, decoders=decoders(once))
    await refused(media, f"data:,{quote(photo)}", InvalidMedia, "cannot be decoded")
    assert is_stored(media, await media.from_url(IMAGE, f"data:,{quote(photo)}", []), photo)


async def test_a_request_cancelled_while_its_image_is_decoded_leaves_nothing(files, photo):
    media = InputFiles(files, offline=True, decoders=decoders("import time; time.sleep(60)"))
    with anyio.move_on_after(0.5) as scope:
        await media.from_url(IMAGE, f"data:,{quote(photo)}", [])
    assert scope.cancelled_caught and list(files.root.iterdir()) == []


async def test_many_images_at_once_take_turns_with_few_decoders(media, photo):
    images: list[StoredImage] = []

    async def store() -> None:
        images.append(await media.from_url(IMAGE, f"data:,{quote(photo)}", []))

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(store)
    assert {image.name for image in images} == {path.name for path in media.files.root.iterdir()}


async def test_a_full_disk(media, photo, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageFull):
        await media.from_url(IMAGE, f"data:,{quote(photo)}", [])
    assert list(media.files.root.iterdir()) == []


# Uploads


@pytest.fixture
async def client(media):
    app = FastAPI()

    @app.post("/api/uploads")
    async def upload(request: Request) -> JSONResponse:
        stored = await media.from_upload(IMAGE, request)
        return JSONResponse({"name": stored.name, "width": stored.info.width, "fresh": stored.is_new}, 201)

    @app.exception_handler(PlantainError)
    async def answer(request: Request, error: PlantainError) -> JSONResponse:
        return JSONResponse(hosted_envelope(error, "req_1"), error.status, error.headers)

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://plantain.example") as client:
        yield client


async def test_a_form_and_a_bare_body_are_stored(media, client, photo):
    for sent in ({"files": {"file": ("cat.gif", photo)}, "data": {"note": "x"}}, {"content": photo}):
        answer = await client.post("/api/uploads", **sent)
        assert (answer.status_code, answer.json()["width"], answer.json()["fresh"]) == (201, 451, True)
        assert media.files.path(answer.json()["name"]).read_bytes() == photo


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"content": b""}, 400, "INVALID_MEDIA"),
        ({"content": b"no image"}, 400, "INVALID_MEDIA"),
        ({"content": BOMB}, 400, "INVALID_MEDIA"),
        ({"files": {"file": b"no image"}}, 400, "INVALID_MEDIA"),
        ({"files": {"image": b"another field"}}, 400, "VALIDATION_ERROR"),
        ({"files": [("file", b"1"), ("file", b"2")]}, 400, "VALIDATION_ERROR"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "VALIDATION_ERROR"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, 400, "VALIDATION_ERROR"),
        ({"content": bytes(32 * MIB + 1)}, 413, "PAYLOAD_TOO_LARGE"),
        ({"files": {"file": bytes(33 * MIB)}}, 413, "PAYLOAD_TOO_LARGE"),
    ],
)
async def test_a_bad_upload_leaves_nothing(media, client, sent, status, code):
    answer = await client.post("/api/uploads", **sent)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert list(media.files.root.iterdir()) == []
