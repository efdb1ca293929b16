"""Where a URL may lead: public addresses only, checked on every hop, and connected to as checked."""

import ipaddress
import shutil
import ssl
import subprocess
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import skimage.data
from PIL import Image

from pipelines.media.images import save_image
from server.errors import AddressRefused, InvalidMedia, MediaUnreachable, PlantainError
from server.files.fetch import AddressGuard, is_public
from server.files.inputs import IMAGE, InputFiles
from server.files.store import FileStore
from tests.support.http import LOOPBACK, Web, is_stored, refused, resolver

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    save_image(Image.fromarray(skimage.data.chelsea()), path)
    return path.read_bytes()


@pytest.fixture
async def web():
    async with Web().running() as web:
        yield web


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


@pytest.fixture
def media(files: FileStore) -> InputFiles:
    return InputFiles(files, offline=False, allowed_networks=LOOPBACK)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://example.com/x.png", "gopher://x", "blob:https://x/y", "cat.png",
     "//example.com/cat.png", " https://example.com/cat.png", "/etc/passwd", "javascript:alert(1)"],
)  # fmt: skip
async def test_other_schemes(media, url):
    await refused(media, url, AddressRefused, "https:, http: or data: URL")


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "https:cat.png", "http://[::1/", "http://x:port/", "http://x\n/"]
)
async def test_broken_urls(media, url):
    await refused(media, url, InvalidMedia)


async def test_user_names_and_low_ports(media):
    await refused(media, "http://user:secret@127.0.0.1/", AddressRefused, "user name or password")
    for port in (0, 22, 25, 445, 65_536):
        await refused(media, f"http://127.0.0.1:{port}/", AddressRefused, f"Port {port}")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.8.8.8", "localhost", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
     "100.100.100.200", "168.63.129.16", "224.0.0.1", "255.255.255.255", "192.0.2.1", "240.0.0.1", "[::1]", "[::]",
     "[fe80::1]", "[fd00:ec2::254]", "[ff02::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]",
     "[64:ff9b::7f00:1]", "[64:ff9b::808:808]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]",
     "[2001:db8::1]", "[3fff::1]", "[fec0::1]", "[100::1]"],
)  # fmt: skip
async def test_addresses_that_are_not_public(files, host):
    await refused(InputFiles(files, offline=False), f"http://{host}/cat.png", AddressRefused)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "1.1.1", "010.8.8.8"])
async def test_unusual_spellings_of_addresses(media, host):
    await refused(media, f"http://{host}/cat.png", PlantainError, "unusual way|not a URL")


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450::1"])
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


async def test_a_public_address_is_where_the_guard_lets_go():
    guard = AddressGuard(resolve=resolver(["93.184.215.14", "2606:2800:21f::1", "93.184.215.14"]))
    for url in ("https://example.com/", "http://example.com:8080/", "https://bücher.example/"):
        assert await guard.addresses(httpx.URL(url)) == ["93.184.215.14", "2606:2800:21f::1"]


async def test_a_name_with_one_private_address_among_public_ones(files):
    media = InputFiles(files, offline=False, resolve=resolver(["8.8.8.8", "10.0.0.1"]))
    await refused(media, "http://mixed.example/cat.png", AddressRefused, "host mixed.example is at a private")


async def test_a_redirect_is_checked_like_the_url_itself(web, media):
    port = web.url.rpartition(":")[2]
    for target in (f"http://127.0.0.2:{port}/", "http://169.254.169.254/latest/meta-data", "http://[::1]/",
                   "file:///etc/passwd", "http://user@127.0.0.1/", "//127.0.0.1:22/"):  # fmt: skip
        await refused(media, web.redirect("/", target), AddressRefused)


async def test_the_connection_goes_to_the_address_that_was_checked(web, files, photo):
    """DNS rebinding: the name's second answer would be another address, but nobody asks a second time."""
    media = InputFiles(files, offline=False, allowed_networks=LOOPBACK, resolve=resolver(["127.0.0.1"], ["127.0.0.2"]))
    port = web.url.rpartition(":")[2]
    web.answer("/cat.png", photo)
    assert is_stored(media, await media.from_url(IMAGE, f"http://rebind.example:{port}/cat.png", []), photo)
    assert f"host: rebind.example:{port}\r\n" in web.requests[0].lower()
    with pytest.raises(AddressRefused):
        await media.from_url(IMAGE, f"http://rebind.example:{port}/cat.png", [])


async def test_the_next_address_is_tried_if_one_does_not_answer(web, files, photo):
    both = (ipaddress.ip_network("127.0.0.0/8"),)
    media = InputFiles(files, offline=False, allowed_networks=both, resolve=resolver(["127.0.0.3", "127.0.0.1"]))
    web.answer("/cat.png", photo)
    assert is_stored(
        media, await media.from_url(IMAGE, f"http://two.example:{web.url.rpartition(':')[2]}/cat.png", []), photo
    )


async def test_proxies_of_the_environment_are_not_used(web, media, photo, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert is_stored(media, await media.from_url(IMAGE, web.answer("/cat.png", photo), []), photo)


async def test_cookies_are_not_carried_from_one_caller_to_the_next(web, media, photo):
    url = web.answer("/cat.png", photo, Set_Cookie="session=1")
    for _ in range(2):
        await media.from_url(IMAGE, url, [])
    assert "cookie" not in web.requests[1].lower()


async def test_offline_refuses_the_network_and_nothing_else(files, photo):
    media = InputFiles(files, offline=True, allowed_networks=LOOPBACK)
    await refused(media, "https://example.com/cat.png", AddressRefused, "offline")
    assert is_stored(media, await media.from_url(IMAGE, f"data:,{quote(photo)}", []), photo)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pictures.example "
        "-addext subjectAltName=DNS:pictures.example -keyout key.pem -out certificate.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


async def test_certificates_are_checked_against_the_name_not_the_address(files, certificate, photo):
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    names: list[str] = []
    serving.sni_callback = lambda connection, name, context: names.append(name)
    trusting = ssl.create_default_context(cafile=certificate / "certificate.pem")
    media = InputFiles(files, offline=False, allowed_networks=LOOPBACK, resolve=resolver(["127.0.0.1"]), tls=trusting)
    async with Web().running(serving) as web:
        port = web.url.rpartition(":")[2]
        web.answer("/cat.png", photo)
        await refused(media, f"https://other.example:{port}/cat.png", MediaUnreachable, "CERTIFICATE_VERIFY_FAILED")
        assert is_stored(media, await media.from_url(IMAGE, f"https://pictures.example:{port}/cat.png", []), photo)
    assert names == ["other.example", "pictures.example"]
