"""The fake fal, proven with fal's official client: what speaks to it speaks to fal."""

from collections.abc import Iterator

import fal_client
import fal_client.client as wire
import pytest

from tests.support.fal import KEY, FakeFal


@pytest.fixture
def fal(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFal]:
    with FakeFal().running() as fake:
        monkeypatch.setattr(wire, "QUEUE_URL_FORMAT", f"{fake.url}/queue/")
        monkeypatch.setattr(wire, "REST_URL", f"{fake.url}/rest")
        monkeypatch.setattr(wire, "CDN_URL", f"{fake.url}/v3")
        yield fake


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[fal_client.SyncClient]:
    """Closed as it does not close itself: it leaves the connections of its uploads to chance."""
    client = fal_client.SyncClient(key=KEY)
    opened, of_uploads = [client._client], fal_client.SyncClient._get_cdn_client

    def noted(self: fal_client.SyncClient):
        opened.append(of_uploads(self))
        return opened[-1]

    monkeypatch.setattr(fal_client.SyncClient, "_get_cdn_client", noted)
    yield client
    for each in opened:
        each.close()


def test_submit_follow_and_take_the_result(fal: FakeFal, client: fal_client.SyncClient):
    fal.result = {"images": [{"url": fal.serves("a.png", b"x")}], "seed": 5}
    handle = client.submit("fal-ai/flux/dev/image-to-image", {"prompt": "a cat"})
    seen = [type(status).__name__ for status in handle.iter_events(with_logs=True, interval=0.001)]
    assert seen == ["Queued", "InProgress", "Completed"]
    assert handle.get() == fal.result
    assert [(job.endpoint, job.arguments) for job in fal.submitted] == [
        ("fal-ai/flux/dev/image-to-image", {"prompt": "a cat"})
    ]


def test_cancel(fal: FakeFal, client: fal_client.SyncClient):
    fal.hold = True
    handle = client.submit("fal-ai/flux/dev", {})
    handle.cancel()
    assert fal.cancels == [handle.request_id]


def test_a_refusal_at_the_result(fal: FakeFal, client: fal_client.SyncClient):
    detail = [{"loc": ["body", "prompt"], "msg": "too rude", "type": "content_policy_violation", "url": ""}]
    fal.refuse("result", 422, {"detail": detail})
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        client.subscribe("fal-ai/flux/dev", {})
    assert caught.value.status_code == 422 and caught.value.response.json()["detail"] == detail


def test_a_wrong_key(fal: FakeFal):
    client = fal_client.SyncClient(key="nobody:nothing")
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        client.submit("fal-ai/flux/dev", {})
    assert caught.value.status_code == 401
    client._client.close()


def test_upload(fal: FakeFal, client: fal_client.SyncClient):
    url = client.upload(b"some bytes", "video/mp4", "a.mp4", repository="fal_v3")
    assert fal.uploads[url.rpartition("/")[2]] == b"some bytes"
