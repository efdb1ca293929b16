"""Real-ESRGAN and all other upscalers that spandrel supports: pictures of any size, tile by tile, alpha preserved.

Memory is the input, the output (4 bytes per pixel) and the working set of one window, for any size of picture.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from pipelines.base import Component, InvalidInput, InvalidOutput, Loader, OnStep, UnusableWeights, Weights
from pipelines.media.images import open_image
from pipelines.params import Upscale
from pipelines.residency.residency import Residency

WINDOW = {"cuda": 3072, "cpu": 2048}
"""The maximum side of a window, in output pixels, where a deep network computes with 64 channels.

Two to three such layers are held at once: on a CPU (float32) 530 bytes per pixel, 2.2 GB for the largest window; the
larger windows of a GPU take about as much in float16. Smaller windows read the context more often: x4plus reads each
pixel 1.9 times with 2,048, and 2.6 times with 1,536.
"""

CONTEXT = 288
"""Pixels of real context around each tile, in output pixels, unless the network's receptive field is smaller.

x4plus has the largest receptive field: 351 convolutions. On three photos, its tiles differed from the untiled result
(of 255 levels) by at most 14 with 128, 5.1 with 192, 1.05 with 256, 0.58 (PSNR 75 dB) with 288. Run
`scripts/benchmarks/tiles.py` for the differences of all three starter networks on a photo.
"""

BLEED = 16
"""How far visible colour is extended under transparent pixels, in input pixels.

Measured on a light grey disc (230) on transparent black, enlarged four times by animevideov3: its visible pixels are
0 to 255 with 0, 220 to 248 with 2, 233 to 237 with 8, 235 to 237 with 16. The same grey without a hole is 231 to 239.
"""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, as Pillow has them."""


def build(weights: Weights, residency: Residency) -> "RealEsrgan":
    """The adapter for one model. Loads no network; runs do."""
    return RealEsrgan(weights, residency)


def loader(weights: Weights, device: torch.device) -> Loader:
    """Loads the network to the host; in float16 for a GPU, if the network supports it."""
    return Loader(partial(load_for, device))


class RealEsrgan:
    """One upscaler: a single component, `network`, in one safetensors file."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        self._component = weights.component("network")
        self._residency = residency

    def generate(self, params: Upscale, on_step: OnStep) -> Image.Image:
        """The picture, `params.scale` times wider and higher; RGB, or RGBA if the input has alpha.

        Raises `InvalidInput` for an unusable file or unsupported scale, `InvalidOutput` for NaN or infinite pixels, and
        whatever `on_step` raises; it is called after each tile.
        """
        image = open_image(params.image)
        network = self._residency.acquire(self._component, partial(load_for, self._residency.device))
        return upscale(network, image, params.scale, on_step)


class Network(torch.nn.Module):
    """spandrel's network and its properties. (1, 3, H, W) in [0, 1] -> (1, 3, H * scale, W * scale), float32."""

    def __init__(self, descriptor: ImageModelDescriptor) -> None:
        super().__init__()
        self.model = descriptor.model.eval().requires_grad_(False)
        self.scale = descriptor.scale
        self.multiple = descriptor.size_requirements.multiple_of
        self.supports_half = descriptor.supports_half
        self.context = min(reach(self.model) * self.multiple, CONTEXT // self.scale)
        self._descriptor = descriptor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # spandrel pads pictures that are too small for the network. Channels last is 1.2 times faster.
        pixels = pixels.to(self._descriptor.dtype, memory_format=torch.channels_last)
        return self._descriptor(pixels).float()


def load_for(device: torch.device, component: Component) -> Network:
    network = load(component)
    return network.half() if device.type == "cuda" and network.supports_half else network


def load(component: Component) -> Network:
    """The network of a safetensors file, float32, on the host. Raises `UnusableWeights`, naming the file."""
    try:
        descriptor = ModelLoader().load_from_state_dict(load_file(component.path))
    except (OSError, SafetensorError, UnsupportedModelError, RuntimeError) as error:
        raise UnusableWeights(f"{component.path}: {error or 'not an upscaler that spandrel supports'}") from error
    channels = descriptor.input_channels, descriptor.output_channels
    if not isinstance(descriptor, ImageModelDescriptor) or channels != (3, 3):
        raise UnusableWeights(
            f"{component.path}: {descriptor.architecture.name} from {channels} channels, not RGB to RGB"
        )
    return Network(descriptor)


def reach(model: torch.nn.Module) -> int:
    """The radius of the receptive field, in pixels, if all convolutions are in sequence at the input's resolution."""
    convolutions = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    return sum((layer.kernel_size[0] - 1) // 2 * layer.dilation[0] for layer in convolutions)


@torch.inference_mode()
def upscale(network: Network, image: Image.Image, scale: int, on_step: OnStep) -> Image.Image:
    """Enlarges `image` tile by tile. If the network's scale is larger, the tiles are reduced by averaging pixels."""
    if network.scale % scale:
        raise InvalidInput(f"This model enlarges {network.scale} times; it cannot enlarge {scale} times.")
    device = next(network.parameters()).device
    side = WINDOW[device.type] // network.scale
    tiles = cut(image.size, side, network.context, network.multiple)
    output = Image.new(image.mode, (image.width * scale, image.height * scale))
    for done, tile in enumerate(tiles, 1):
        pixels = enlarge(network, to_pixels(image.crop(tile.window), device))
        pixels = avg_pool2d(pixels, network.scale // scale)
        output.paste(to_image(keep(pixels, tile, scale)), (tile.kept[0] * scale, tile.kept[1] * scale))
        on_step("upscale", done, len(tiles))
    return output


def enlarge(network: Network, pixels: torch.Tensor) -> torch.Tensor:
    """(1, 3 or 4, H, W) in [0, 1] -> the same channels, `network.scale` times larger."""
    colour, alpha = pixels[:, :3], pixels[:, 3:]
    if alpha.numel() == 0:
        return network(colour)
    if not alpha.any():
        return interpolate(pixels, scale_factor=network.scale)
    return torch.cat([network(bleed(colour, alpha)), enlarge_alpha(network, alpha)], 1)


def enlarge_alpha(network: Network, alpha: torch.Tensor) -> torch.Tensor:
    """Enlarges alpha through the network, as grey (Real-ESRGAN's default), so that edges match those of the colours.

    The result is clamped to the minimum and maximum of the 3 x 3 input pixels around: opaque and empty areas remain so,
    and a tile without edges needs no network.
    """
    around = torch.cat([-max_pool2d(-alpha, 3, 1, 1), max_pool2d(alpha, 3, 1, 1)], 1)
    least, most = interpolate(around, scale_factor=network.scale).split(1, 1)
    if torch.equal(least, most):
        return least
    return network(alpha.expand(-1, 3, -1, -1)).mean(1, keepdim=True).clamp(least, most)


def bleed(colour: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Replaces the colour under transparent pixels, up to `BLEED` pixels far, by that of the visible pixels nearby.

    In most files it is black, which the network would blend into the edge as a dark fringe.
    """
    weight = alpha
    for _ in range(BLEED):
        total = avg_pool2d(weight, 3, 1, 1)
        reached = (weight == 0) & (total > 0)
        colour = torch.where(reached, avg_pool2d(colour * weight, 3, 1, 1) / total, colour)
        weight = torch.where(reached, 1.0, weight)
    return colour


def keep(pixels: torch.Tensor, tile: "Tile", scale: int) -> torch.Tensor:
    """The kept part of an enlarged window."""
    x, y = tile.window[:2]
    left, top, right, bottom = tile.kept
    return pixels[..., (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]


def to_pixels(image: Image.Image, device: torch.device) -> torch.Tensor:
    """8-bit picture -> (1, channels, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None] / 255


def to_image(pixels: torch.Tensor) -> Image.Image:
    """(1, channels, H, W) in [0, 1] -> 8-bit picture. Raises `InvalidOutput` for NaN or infinite pixels."""
    if not torch.isfinite(pixels).all():
        raise InvalidOutput("The output has NaN or infinite pixels.")
    array: Any = (pixels[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array)


@dataclass(frozen=True)
class Span:
    """One window along one axis: the network reads `start` to `stop`; of that, `first` to `last` is kept."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tile:
    """A part of a picture: the network reads `window`; of that, `kept` is kept. The kept parts cover the picture."""

    window: Box
    kept: Box


def cut(size: tuple[int, int], side: int, context: int, multiple: int = 1) -> list[Tile]:
    """Tiles, row by row, of a picture of `size` (width, height); the lengths are as in `cut_length`."""
    columns, rows = (cut_length(length, side, context, multiple) for length in size)
    return [Tile((x.start, y.start, x.stop, y.stop), (x.first, y.first, x.last, y.last)) for y in rows for x in columns]


def cut_length(length: int, side: int, context: int, multiple: int = 1) -> list[Span]:
    """The fewest windows of equal size, about `side` pixels at most, with `context` pixels around what is kept of each.

    A window ends at the picture's edge, where the network pads it like a whole picture. Windows start at multiples of
    `multiple`, so that a network that folds pixels aligns them as in the whole picture; `side` and `context` are
    rounded up for that.
    """
    side, context = ceil_to_multiple(side, multiple), ceil_to_multiple(context, multiple)
    count = max(1, ceil_div(length - 2 * context, side - 2 * context))
    window = ceil_to_multiple(ceil_div(length + 2 * context * (count - 1), count), multiple)
    room = max(0, length - window)
    starts = [room * i // max(1, count - 1) // multiple * multiple for i in range(count)]
    stops = [start + window for start in starts[:-1]] + [length]
    seams = [(start + stop) // 2 for stop, start in zip(stops, starts[1:], strict=False)]
    return [Span(*span) for span in zip(starts, stops, *zip(*pairwise([0, *seams, length]), strict=True), strict=True)]


def ceil_to_multiple(length: int, multiple: int) -> int:
    return ceil_div(length, multiple) * multiple


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
