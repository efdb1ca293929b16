"""What a caller's `duration`, `fps`, `aspectRatio` and `resolution` become, by the facts of the real `weights.toml`."""

from typing import Any

import pytest

from pipelines.catalog.reader import load_catalog
from pipelines.media.images import ImageInfo
from pipelines.params import GenerateVideo
from server.errors import BadRequest
from server.files.inputs import StoredFile, StoredImage
from server.intake.params import InputVideo, resolve

CATALOG = load_catalog()
LONG = InputVideo("v.mp4", 1920, 1080, 29.97, 60.0)
WAN_LENGTHS = [round(frames / 16, 3) for frames in range(5, 82, 4)]
WAN, LTX = "wan-2.1-vace-14b", "ltx-video"


def picture(width: int, height: int) -> StoredImage:
    return StoredFile("a.png", ImageInfo("png", "image/png", width, height, False), 1, is_new=True)


def resolved(model: str, workflow: str, *images: StoredImage, video: InputVideo | None = None, **sent: Any) -> Any:
    body = GenerateVideo.model_validate({"prompt": "x", "model": model, **sent})
    return resolve(CATALOG.models[model], workflow, body, images, video)


def shape(*asked: Any, **sent: Any) -> tuple[int, int, int, int]:
    params = resolved(*asked, **sent).params
    return params.width, params.height, params.num_frames, params.fps


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({}, (832, 480, 81, 16)),
        ({"duration": 3}, (832, 480, 49, 16)),
        ({"duration": 3.1}, (832, 480, 49, 16)),
        ({"duration": 0.3}, (832, 480, 5, 16)),
        ({"aspectRatio": "9:16", "resolution": "720p"}, (720, 1280, 81, 16)),
        ({"aspectRatio": "1:1"}, (624, 624, 81, 16)),
    ],
)
def test_wan_makes_one_and_a_multiple_of_four_frames(sent: dict[str, Any], expected: tuple[int, ...]):
    assert shape(WAN, "text-to-video", **sent) == expected


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({}, (832, 480, 121, 24)),
        ({"duration": 10}, (832, 480, 241, 24)),
        ({"duration": 5, "fps": 30}, (832, 480, 153, 30)),
        ({"resolution": "720p"}, (1216, 704, 121, 24)),
    ],
)
def test_ltx_makes_one_and_a_multiple_of_eight_frames(sent: dict[str, Any], expected: tuple[int, ...]):
    assert shape(LTX, "text-to-video", **sent) == expected


def test_every_length_there_is_comes_out_no_further_off_than_half_a_step():
    for model, step in ((WAN, 4), (LTX, 8)):
        for tenths in range(4, 50):
            _, _, frames, fps = shape(model, "text-to-video", duration=tenths / 10)
            assert frames % step == 1
            assert abs(frames / fps - tenths / 10) <= step / fps / 2 + 1e-9


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1920, 1080, (832, 480)),
        (1080, 1920, (480, 832)),
        (832, 480, (832, 480)),
        (3000, 3000, (624, 624)),
        (1500, 1000, (768, 512)),
        (5000, 100, (1264, 320)),
    ],
)
def test_a_video_has_its_pictures_shape(width: int, height: int, expected: tuple[int, int]):
    assert shape(WAN, "image-to-video", picture(width, height))[:2] == expected
    assert expected[0] % 16 == expected[1] % 16 == 0


def test_the_ratio_asked_for_counts_more_than_the_pictures():
    assert shape(WAN, "image-to-video", picture(100, 100), aspectRatio="16:9")[:2] == (832, 480)


def test_references_do_not_tell_the_shape_but_a_reference_video_does():
    assert shape(WAN, "reference-to-video", picture(100, 100))[:2] == (832, 480)
    square = InputVideo("v.mp4", 500, 500, 24.0, 9.0)
    assert shape(WAN, "reference-to-video", picture(100, 300), video=square)[:2] == (624, 624)


def test_extending_adds_a_multiple_of_the_step_at_the_rate_nearest_to_the_videos():
    assert shape(WAN, "extend", video=LONG) == (832, 480, 80, 16)
    assert shape(LTX, "extend", video=LONG) == (832, 480, 152, 30)
    assert shape(LTX, "extend", video=LONG, fps=24, duration=2) == (832, 480, 48, 24)


def test_a_reference_video_is_followed_as_long_as_it_lasts():
    short = InputVideo("v.mp4", 832, 480, 24.0, 2.0)
    assert shape(WAN, "reference-to-video", video=short)[2:] == (33, 16)
    assert shape(WAN, "reference-to-video", video=short, duration=4)[2:] == (65, 16)
    assert shape(WAN, "reference-to-video", video=LONG)[2:] == (81, 16)


@pytest.mark.parametrize(
    ("sent", "code", "there_is"),
    [
        ({"duration": 10}, "UNSUPPORTED_DURATION", {"durations": WAN_LENGTHS}),
        ({"duration": 0.1}, "UNSUPPORTED_DURATION", {"durations": WAN_LENGTHS}),
        ({"fps": 24}, "VALIDATION_ERROR", {"frameRates": [16]}),
        ({"resolution": "1080p"}, "UNSUPPORTED_RESOLUTION", {"resolutions": ["480p", "720p"]}),
        ({"aspectRatio": "21:9"}, "UNSUPPORTED_ASPECT_RATIO", {"aspectRatios": ["16:9", "9:16", "1:1", "4:3", "3:4"]}),
    ],
)
def test_unsupported_values_are_refused_with_the_supported_ones(
    sent: dict[str, Any], code: str, there_is: dict[str, Any]
):
    with pytest.raises(BadRequest) as caught:
        resolved(WAN, "text-to-video", **sent)
    assert caught.value.code == code
    assert caught.value.extra.items() >= there_is.items()


def test_every_size_of_every_video_model_is_what_its_network_takes():
    for model in CATALOG.models.values():
        for sizes in model.resolutions.values():
            for ratio, (width, height) in sizes.items():
                across, down = map(int, ratio.split(":"))
                assert width % model.size_multiple == height % model.size_multiple == 0
                assert width / height == pytest.approx(across / down, rel=0.04)


def test_what_has_no_effect_is_told_and_what_has_is_not():
    sent = {"duration": 3, "fps": 16, "aspectRatio": "1:1", "resolution": "480p", "negativePrompt": "x"}
    assert resolved(WAN, "text-to-video", **sent).ignored == frozenset()
    sent = {"imageUrl": "data:,", "audioUrl": "data:,", "mood": "sad"}
    assert resolved(WAN, "text-to-video", **sent).ignored == {"imageUrl", "audioUrl", "mood"}


def test_the_price_is_for_what_was_asked():
    assert resolved(WAN, "text-to-video", duration=3.1).priced == {"duration": 3.1, "resolution": "480p"}


def test_names_of_files_go_into_the_params():
    extended = resolved(LTX, "extend", video=LONG).params
    assert extended.video.name == "v.mp4"
    assert [path.name for path in resolved(LTX, "image-to-video", picture(9, 9)).params.images] == ["a.png"]
