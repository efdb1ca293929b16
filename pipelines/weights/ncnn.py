"""Reads Real-ESRGAN networks out of ncnn's files and writes them as safetensors, with the names that spandrel knows.

ncnn's `.param` is text, a line a layer; its `.bin` is the weights of those layers, in order, with no names or shapes.
Layout: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FP32 = 0
FP16 = 0x01306B47
"""The flag before a convolution's weights: how they are stored."""


@dataclass(frozen=True)
class Layer:
    kind: str
    outputs: int
    kernel: int = 0
    weights: int = 0


class Reader:
    """A cursor over the `.bin`."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def floats(self, number: int, dtype: str = "<f4") -> "np.ndarray":
        import numpy as np

        values = np.frombuffer(self.data, dtype, number, self.at)
        self.at += -(-values.nbytes // 4) * 4  # ncnn pads each blob to four bytes
        return values.astype(np.float32)

    def tagged_floats(self, number: int) -> "np.ndarray":
        """Weights behind their storage flag."""
        flag = int.from_bytes(self.data[self.at : self.at + 4], "little")
        self.at += 4
        if flag not in (FP32, FP16):
            raise ValueError(f"ncnn storage flag {flag:#010x} is not known")
        return self.floats(number, "<f4" if flag == FP32 else "<f2")


def convert(param: str, data: bytes) -> bytes:
    """The safetensors file of the network in `param` and `data`. The same bytes each time."""
    from safetensors.numpy import save

    layers = list(read_layers(param))
    reader = Reader(data)
    tensors = dict(read_tensors(reader, layers))
    if reader.at != len(data):
        raise ValueError(
            f"ncnn weights end at byte {reader.at} of {len(data)}: these are not the weights of this graph"
        )
    return save(tensors)


def read_layers(param: str) -> Iterator[Layer]:
    """The layers that have weights, in order."""
    for line in param.splitlines()[2:]:  # a magic number, and how many layers and blobs
        kind, _name, inputs, outputs, *rest = line.split()
        fields = dict(field.split("=", 1) for field in rest[int(inputs) + int(outputs) :])
        if kind == "Convolution":
            yield Layer(kind, int(fields["0"]), int(fields["1"]), int(fields["6"]))
        elif kind == "PReLU":
            yield Layer(kind, int(fields["0"]))


def read_tensors(reader: Reader, layers: list[Layer]) -> Iterator[tuple[str, "np.ndarray"]]:
    for name, layer in zip(layer_names(layers), layers, strict=False):
        if layer.kind == "PReLU":
            yield f"{name}.weight", reader.floats(layer.outputs)
            continue
        shape = (layer.outputs, -1, layer.kernel, layer.kernel)
        yield f"{name}.weight", reader.tagged_floats(layer.weights).reshape(shape)
        yield f"{name}.bias", reader.floats(layer.outputs)


def layer_names(layers: list[Layer]) -> Iterable[str]:
    """The compact network (SRVGGNet) numbers its layers. Only that one has PReLU, an activation with weights."""
    if any(layer.kind == "PReLU" for layer in layers):
        return (f"body.{i}" for i in count())
    return rrdb_names(len(layers))


def rrdb_names(convolutions: int) -> Iterator[str]:
    """Real-ESRGAN's RRDBNet: blocks of three dense blocks of five convolutions, between one before and five after."""
    yield "conv_first"
    for block in range((convolutions - 6) // 15):
        for dense in (1, 2, 3):
            for conv in (1, 2, 3, 4, 5):
                yield f"body.{block}.rdb{dense}.conv{conv}"
    yield from ("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")
