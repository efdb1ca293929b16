"""Style transfer by Kontext from an HTTP call with one or several references, on tiny weights."""

import pytest
from PIL import Image

from tests.support.server import GENERATE, LiveServer, data_url

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 48), "blue")


def pixels(live_server: LiveServer, *pictures: Image.Image, **sent: object) -> bytes:
    body = {"prompt": "in the style of a woodcut", "model": "flux-kontext", "seed": 3, "workflow": "style-transfer"}
    answer = live_server.ask(GENERATE, {**body, "imageUrls": [data_url(picture) for picture in pictures], **sent})
    assert answer.status_code == 200, answer.text
    assert "X-Ignored-Fields" not in answer.headers
    return live_server.picture(answer.json()["imageUrl"]).tobytes()


def test_every_reference_counts(live_server: LiveServer):
    outputs = {pixels(live_server, *some) for some in ([RED], [RED, BLUE], [BLUE, RED], [RED, BLUE, RED])}
    assert len(outputs) == 4


def test_a_single_url_comes_before_the_others(live_server: LiveServer):
    assert pixels(live_server, BLUE, imageUrl=data_url(RED)) == pixels(live_server, RED, BLUE)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_image_to_image_heeds_strength(live_server: LiveServer, strength: float):
    body = {"prompt": "a cat", "model": "flux-dev", "seed": 3, "imageUrl": data_url(RED), "strength": strength}
    answer = live_server.ask(GENERATE, body)
    assert answer.status_code == 200, answer.text
    job = live_server.read(f"/api/jobs/{answer.headers['X-Job-Id']}")
    assert (job["workflow"], job["params"]["strength"]) == ("image-to-image", strength)
