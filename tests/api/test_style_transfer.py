"""Style transfer by Kontext from an HTTP call with one or several references, on tiny weights."""

import pytest
from PIL import Image

from tests.support.server import GENERATE, House, data_url

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 48), "blue")


def pixels(house: House, *pictures: Image.Image, **sent: object) -> bytes:
    body = {"prompt": "in the style of a woodcut", "model": "flux-kontext", "seed": 3, "workflow": "style-transfer"}
    answer = house.ask(GENERATE, {**body, "imageUrls": [data_url(picture) for picture in pictures], **sent})
    assert answer.status_code == 200, answer.text
    assert "X-Ignored-Fields" not in answer.headers
    return house.picture(answer.json()["imageUrl"]).tobytes()


def test_every_reference_counts(house: House):
    outputs = {pixels(house, *some) for some in ([RED], [RED, BLUE], [BLUE, RED], [RED, BLUE, RED])}
    assert len(outputs) == 4


def test_a_single_url_comes_before_the_others(house: House):
    assert pixels(house, BLUE, imageUrl=data_url(RED)) == pixels(house, RED, BLUE)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_image_to_image_heeds_strength(house: House, strength: float):
    body = {"prompt": "a cat", "model": "flux-dev", "seed": 3, "imageUrl": data_url(RED), "strength": strength}
    answer = house.ask(GENERATE, body)
    assert answer.status_code == 200, answer.text
    job = house.read(f"/api/jobs/{answer.headers['X-Job-Id']}")
    assert (job["workflow"], job["params"]["strength"]) == ("image-to-image", strength)
