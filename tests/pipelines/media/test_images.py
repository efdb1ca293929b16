"""Pictures of every kind come out upright, 8 bits and sRGB, with the right pixels; broken ones and bombs do not."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms, ImageOps

from pipelines.base import InvalidInput
from pipelines.media.images import ImageInfo, check_decodes, open_image, probe, save_image

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea())  # 451 x 300: no two orientations look alike


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def stored(tmp_path: Path):
    def store(content: bytes) -> Path:
        path = tmp_path / "image"
        path.write_bytes(content)
        return path

    return store


def difference(image: Image.Image, other: Image.Image) -> float:
    """Mean over all channels, 0 to 255."""
    assert (image.mode, image.size) == (other.mode, other.size)
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean())


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    everything = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in everything
    )


def tiff(tags: dict[int, int], strip: bytes) -> bytes:
    """Little-endian, one directory; 324 (TileOffsets) is set to where `strip` is."""
    tags = {**tags, 324: 8 + 2 + 12 * (len(tags) + 1) + 4}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + struct.pack("<I", 0) + strip


# What a header tells


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif"])
def test_every_format_is_known_by_its_content(photo, stored, format):
    path = stored(encoded(photo, format))
    info = ImageInfo(format, f"image/{format}", 451, 300, has_alpha=False)
    assert (probe(path), check_decodes(path)) == (info, info)
    assert difference(open_image(path), photo) < {"gif": 6, "avif": 4, "webp": 4, "jpeg": 4}.get(format, 0.001)


def test_a_jpeg_with_a_second_picture_behind_it_is_a_jpeg(photo, stored):
    path = stored(encoded(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]))
    assert probe(path).mime == check_decodes(path).mime == "image/jpeg"
    assert difference(open_image(path), photo) < 4


# Colours and bits


def test_cmyk_looks_like_the_rgb_it_was_made_of(photo, stored):
    for format in ("JPEG", "TIFF"):  # Adobe's JPEGs are inverted, TIFFs are not
        opened = open_image(stored(encoded(photo.convert("CMYK"), format)))
        assert difference(opened, photo) < 4


def test_an_icc_profile_is_applied(photo, stored):
    linear = ImageCms.createProfile("sRGB")
    wide = ImageCms.ImageCmsProfile(linear).tobytes()
    assert difference(open_image(stored(encoded(photo, "PNG", icc_profile=wide))), photo) < 1
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    swapped = stored(encoded(photo, "PNG", icc_profile=_swapped_profile(wide)))
    red, green, blue = photo.split()
    assert difference(open_image(swapped), Image.merge("RGB", (blue, green, red))) < 1
    assert difference(open_image(stored(encoded(photo, "PNG", icc_profile=lab.tobytes()))), photo) == 0


def _swapped_profile(profile: bytes) -> bytes:
    """The same profile with the colourants of red and blue exchanged: visibly not sRGB."""
    return profile.replace(b"rXYZ", b"-XYZ").replace(b"bXYZ", b"rXYZ").replace(b"-XYZ", b"bXYZ")


def test_a_broken_profile_is_as_good_as_none(photo, stored):
    assert difference(open_image(stored(encoded(photo, "PNG", icc_profile=b"no profile"))), photo) == 0


def test_sixteen_bit_grey_keeps_its_tones(stored):
    ramp = Image.fromarray(np.arange(65_536, dtype=np.uint16).reshape(256, 256))
    expected = np.round(np.arange(65_536) / 257).reshape(256, 256)
    for format in ("PNG", "TIFF"):
        opened = np.asarray(open_image(stored(encoded(ramp, format))))
        assert np.abs(opened - expected[..., None]).max() <= 1


def test_sixteen_bit_colours_keep_their_tones(stored):
    opened = open_image(stored(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32_768, 65_535, 40_000, 10_000, 257))))
    assert np.abs(np.asarray(opened) - [[[0, 128, 255], [156, 39, 1]]]).max() <= 1
    opened = open_image(stored(png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 65_535, 0, 0, 32_768))))
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGBA", (255, 0, 0, 128))


@pytest.mark.parametrize(("brightest", "as_white"), [(1.0, 1.0), (255.0, 255.0), (65_535.0, 65_535.0), (1e6, 1e6)])
def test_floats_are_scaled_by_the_next_usual_white(stored, brightest, as_white):
    half = Image.fromarray(np.array([[0, as_white / 2, brightest]], dtype=np.float32))
    assert np.asarray(open_image(stored(encoded(half, "TIFF"))))[0, :, 0].tolist() == [0, 128, 255]


def test_grey_one_bit_and_grey_with_alpha(photo, stored):
    grey, black_and_white = photo.convert("L"), photo.convert("1")
    assert difference(open_image(stored(encoded(grey, "PNG"))), grey.convert("RGB")) == 0
    assert difference(open_image(stored(encoded(black_and_white, "PNG"))), black_and_white.convert("RGB")) == 0
    with_alpha = Image.merge("LA", (grey, grey.point(lambda value: 255 - value)))
    assert difference(open_image(stored(encoded(with_alpha, "PNG"))), with_alpha.convert("RGBA")) == 0


def test_a_palette_with_transparency_becomes_rgba(stored):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    path = stored(encoded(image, "PNG", transparency=bytes([255, 128, 0])))
    assert probe(path).has_alpha
    opened = open_image(path)
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0, 255), (0, 255, 0, 128), (0, 0, 255, 0)]


def test_a_colour_may_be_the_transparent_one(stored):
    opened = open_image(stored(png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", (b"tRNS", struct.pack(">3H", 1, 2, 3)))))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(1, 2, 3, 0), (4, 5, 6, 255)]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(photo, stored, format):
    frames = [photo.rotate(180)] * 3
    options = {"lossless": True} if format == "WEBP" else {}
    path = stored(encoded(photo, format, save_all=True, append_images=frames, **options))
    opened = open_image(path).convert("RGB")  # an animated WebP always has an alpha channel
    assert difference(opened, photo) < {"GIF": 6, "AVIF": 4}.get(format, 0.001)
    assert check_decodes(path).width == 451


# Upright


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(photo, stored, format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = stored(encoded(photo, format, exif=exif))
    tagged = photo.copy()
    tagged.getexif()[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(tagged)
    opened = open_image(path)
    assert difference(opened, upright) < 5
    assert not opened.getexif() and not opened.info
    for info in (probe(path), check_decodes(path)):
        assert (info.width, info.height) == upright.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"])
def test_broken_exif_does_no_harm(photo, stored, format, exif):
    path = stored(encoded(photo, format, exif=exif))
    assert (probe(path).width, open_image(path).size) == (451, (451, 300))


# Refused


def test_what_is_no_image_is_refused_and_told_what_is(stored):
    for content in (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n"):
        with pytest.raises(InvalidInput, match="not an image of a kind that can be read"):
            probe(stored(content))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_truncated_file_is_refused(photo, stored, format):
    whole = encoded(photo, format)
    path = stored(whole[: len(whole) // 2])
    for read in (check_decodes, open_image):
        with pytest.raises(InvalidInput):
            read(path)


def test_a_damaged_png_is_refused(photo, stored):
    content = bytearray(encoded(photo, "PNG"))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(InvalidInput, match="truncated or corrupt"):
        check_decodes(stored(bytes(content)))


def test_a_missing_file_is_not_the_callers_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "missing")


SIDE = 60_000
PIXEL_BOMBS = {
    "png": png(SIDE, SIDE, 8, 2, b""),
    "gif": b"GIF89a" + struct.pack("<HHBBB6x", SIDE, SIDE, 0x80, 0, 0)
    + b"," + struct.pack("<HHHHB", 0, 0, SIDE, SIDE, 0) + b"\x02\x02\x4c\x01\0;",
    "bmp": b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, *[0] * 6),
    "jpeg": encoded(Image.new("L", (8, 8)), "JPEG").replace(b"\x08\0\x08\0\x08\x01", b"\x08\xea\x60\xea\x60\x01"),
    "tiff": tiff({256: SIDE, 257: SIDE, 258: 8, 259: 1, 262: 1, 277: 1, 325: 1, 322: 16, 323: 16}, b"\0"),
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<IB", 10, 2) + bytes(3) + b"\xfe\x3f\0" * 2,
    "avif": encoded(Image.new("RGB", (16, 16)), "AVIF").replace(
        struct.pack(">4xII", 16, 16), struct.pack(">4xII", SIDE, SIDE)
    ),
    "png, a little too large": png(8_193, 8_192, 8, 2, b""),
    "png, where Pillow only warns": png(10_000, 10_000, 8, 2, b""),
}  # fmt: skip


@pytest.mark.parametrize("bomb", PIXEL_BOMBS)
def test_too_many_declared_pixels_are_refused_from_the_header(stored, bomb):
    for read in (probe, check_decodes, open_image):
        with pytest.raises(InvalidInput, match=r"pixels|not an image"):
            read(stored(PIXEL_BOMBS[bomb]))


def test_small_files_that_unpack_to_much_are_refused(stored):
    zeros = zlib.compress(bytes(100 * 2**20))
    for chunk in ((b"zTXt", b"k\0\0" + zeros), (b"iCCP", b"k\0\0" + zeros), (b"iTXt", b"k\0\1\0\0\0" + zeros)):
        with pytest.raises(InvalidInput):
            probe(stored(png(1, 1, 8, 2, bytes(4), chunk)))


def test_a_tiff_with_giant_tiles_is_refused(stored):
    """Sixteen by sixteen pixels, in one tile of 24,000 by 24,000: 576 MB to decode."""
    content = tiff({256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 24_000, 323: 24_000, 325: 9}, b"x" * 9)
    with pytest.raises(InvalidInput, match="tiles"):
        probe(stored(content))


# Saving


@pytest.mark.parametrize(("format", "tolerance"), [("png", 0), ("jpeg", 2), ("webp", 4)])
def test_a_saved_image_opens_as_it_was(photo, tmp_path, format, tolerance):
    path = tmp_path / "saved"
    save_image(photo, path, format)
    assert (probe(path).format, [entry.name for entry in tmp_path.iterdir()]) == (format, ["saved"])
    assert difference(open_image(path), photo) <= tolerance


def test_alpha_is_kept_but_in_jpeg_where_it_lies_on_white(photo, tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    save_image(image, tmp_path / "png", "png")
    assert difference(open_image(tmp_path / "png"), image) == 0
    save_image(image.resize((32, 16), Image.Resampling.NEAREST), tmp_path / "jpeg", "jpeg")
    flat = open_image(tmp_path / "jpeg")
    assert min(flat.getpixel((28, 8))) > 250 and flat.getpixel((4, 8))[1] < 5


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_no_metadata_is_saved(photo, tmp_path, stored, format):
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    tagged = Image.open(stored(encoded(photo, "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret")))
    with tagged:
        save_image(tagged, tmp_path / "saved", format)
    assert b"secret" not in (tmp_path / "saved").read_bytes()


def test_a_failed_save_leaves_what_was_there(photo, tmp_path, monkeypatch):
    path = tmp_path / "saved"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_image(photo, path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("saved", b"before")]


def test_a_side_too_long_for_the_format_is_said_so(tmp_path):
    with pytest.raises(InvalidInput, match="at most 16,383 pixels a side; use png"):
        save_image(Image.new("RGB", (20_000, 1)), tmp_path / "saved", "webp")
