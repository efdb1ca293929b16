"""Pictures from anywhere, made plain: a few known formats in; upright, 8-bit sRGB out. Pillow only, no torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from PIL import (
    AvifImagePlugin,
    ExifTags,
    Image,
    ImageCms,
    ImageFile,
    ImageOps,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pipelines.base import InvalidInput

MAX_PIXELS = 64 * 2**20

MIME_TYPES = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "bmp": "image/bmp", "tiff": "image/tiff", "avif": "image/avif",
}  # fmt: skip
PLUGINS = AvifImagePlugin, TiffImagePlugin, WebPImagePlugin  # imported, or Pillow imports forty others to find them
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF"

# Measured on a 1-megapixel photo (RGB): zlib level 1 takes 71 ms for 1.37 MB, 4 126 ms for 1.22 MB, 6 (Pillow's own)
# 351 ms for 1.21 MB, 9 1,350 ms for 1.18 MB. JPEG 95 without chroma subsampling: 5 ms, 0.34 MB, 46 dB PSNR.
# WebP 90: method 2 takes 35 ms, method 4 (Pillow's own) 241 ms, for 0.11 MB and 41 dB either way.
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 90, "method": 2},
}
MAX_SIDES = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
NO_METADATA = {"exif": b"", "xmp": b"", "icc_profile": None, "comment": None, "transparency": None}


@dataclass(frozen=True)
class ImageInfo:
    """What a file's header says. `width` and `height` are the upright picture's."""

    format: str
    mime: str
    width: int
    height: int
    has_alpha: bool

    @property
    def suffix(self) -> str:
        """Of a file of this format, with its dot."""
        return ".jpg" if self.format == "jpeg" else f".{self.format}"


def probe(path: Path) -> ImageInfo:
    """Read the header only. Raises `InvalidInput` for what is no image, no known format, or a bomb."""
    with _opened(path) as image:
        return _info(image, image.size)


def check_decodes(path: Path) -> ImageInfo:
    """Decode the whole file and throw the pixels away. Raises `InvalidInput` if it is truncated or corrupt."""
    with _opened(path) as image:
        size = image.size
        image.draft(None, (1, 1))  # a JPEG is read to its end, but kept at an eighth of its size
        image.load()
        return _info(image, size)


def open_image(path: Path) -> Image.Image:
    """The first frame, upright, in sRGB, 8 bits: RGB, or RGBA where the file has transparency."""
    with _opened(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _plain(image)


def open_flat(path: Path) -> Image.Image:
    """In RGB; what is transparent becomes white."""
    picture = open_image(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def open_covering(path: Path, size: tuple[int, int]) -> Image.Image:
    """Flat, covering `size`: scaled by Lanczos, its overhang cropped evenly."""
    return ImageOps.fit(open_flat(path), size, Image.Resampling.LANCZOS)


def save_image(image: Image.Image, path: Path, format: str = "png") -> None:
    """Write the pixels and nothing else (no EXIF, no profile): the whole file appears, safely on disk, or none."""
    if max(image.size) > MAX_SIDES[format]:
        raise InvalidInput(f"A {format} file holds at most {MAX_SIDES[format]:,} pixels a side; use png.")
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            _encodable(image, format).save(file, format, **ENCODINGS[format], **NO_METADATA)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _encodable(image: Image.Image, format: str) -> Image.Image:
    if format == "jpeg" and image.has_transparency_data:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.convert("RGBA").getchannel("A"))
        return flat
    return image


# Reading


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The header, read and found reasonable. Whatever a decoder raises on a bad file is the caller's fault."""
    formats = tuple(name.upper() for name in MIME_TYPES)
    with path.open("rb") as file:
        try:
            with Image.open(file, formats=formats) as image:
                _refuse_bombs(image)
                _forget_broken_exif(image)
                yield image
        except InvalidInput:
            raise
        except UnidentifiedImageError as error:
            raise InvalidInput(f"This is not an image of a kind that can be read ({READABLE} are).") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InvalidInput(f"The image has more pixels than the {MAX_PIXELS:,} that are taken.") from error
        except Exception as error:
            raise InvalidInput("The image is truncated or corrupt.") from error


def _refuse_bombs(image: ImageFile.ImageFile) -> None:
    """Small files that would take a great deal of memory. What takes a great deal of time is for the caller to stop."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InvalidInput(f"The image is {width} x {height}: more than the {MAX_PIXELS:,} pixels that are taken.")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if tags.get(TiffImagePlugin.TILEWIDTH, 1) * tags.get(TiffImagePlugin.TILELENGTH, 1) > MAX_PIXELS:
            raise InvalidInput(f"The TIFF's tiles have more than the {MAX_PIXELS:,} pixels that are taken.")


def _forget_broken_exif(image: ImageFile.ImageFile) -> None:
    """The picture is good all the same."""
    try:
        Image.Image.getexif(image)  # the base class's: PNG's own would decode the picture
    except Exception:
        del image.info["exif"]


def _format(image: ImageFile.ImageFile) -> str:
    """An MPO is a JPEG with further pictures behind it (phones: depth, gain map)."""
    return "jpeg" if image.format == "MPO" else str(image.format).lower()


def _info(image: ImageFile.ImageFile, size: tuple[int, int]) -> ImageInfo:
    width, height = reversed(size) if _lies_on_its_side(image) else size
    return ImageInfo(_format(image), MIME_TYPES[_format(image)], width, height, image.has_transparency_data)


def _lies_on_its_side(image: ImageFile.ImageFile) -> bool:
    """By EXIF orientation; Pillow gives a TIFF's size upright already."""
    return image.format != "TIFF" and Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


# Colours


def _plain(image: Image.Image) -> Image.Image:
    image = _eight_bits(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = _srgb(image)
    if alpha:
        plain.putalpha(alpha)
    plain.info = {}
    return plain


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floats; the last two have no fixed white: the next one above the brightest pixel."""
    if not image.mode.startswith(("I", "F")):
        return image
    wide, brightest = image, 65_535.0
    if image.mode.startswith("I;16"):
        wide = image.convert("I")
    else:
        brightest = cast(float, image.getextrema()[1])
    white = next((white for white in (1, 255, 65_535) if brightest <= white), brightest)
    return wide.point(lambda value: value * (255 / white) + 0.5).convert("L")


def _srgb(image: Image.Image) -> Image.Image:
    """A new RGB picture, its colours by the embedded ICC profile if it has a usable one."""
    base = _without_alpha(image)
    if profile := image.info.get("icc_profile"):
        try:
            source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(base, source, srgb, outputMode="RGB") or base
        except (ImageCms.PyCMSError, OSError):
            pass  # broken, or for other channels than these: as if there were none
    return base.copy() if base.mode == "RGB" else base.convert("RGB")


def _without_alpha(image: Image.Image) -> Image.Image:
    """Grey, RGB or CMYK: the channels that an ICC profile speaks of."""
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image.convert("RGBA").convert("RGB")
