"""The kinds of weights file that are loaded, and how to tell them from a pickle.

safetensors and ONNX; and GGUF, where `weights.toml` names the very file. All three are data: loading them runs no code.
"""
# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. No header value is trusted before it is checked.

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.weights.errors import Damaged, PickleRefused

GGUF_MAGIC, GGUF_VERSIONS = b"GGUF", (2, 3)
MAX_TENSORS, MAX_PAIRS, MAX_TEXT_BYTES, MAX_DIMENSIONS = 1 << 16, 1 << 16, 1 << 20, 8
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32

SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
"""Numbers of the types that a value in the header may have."""

KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""What a tensor may be kept as, by its number: name, elements of a group, its bytes. diffusers computes with these."""


@dataclass(frozen=True)
class GgufTensor:
    name: str
    kind: str
    elements: int
    size_bytes: int


def gguf_tensors(path: Path) -> list[GgufTensor]:
    """Raises `Damaged` for a file that is none, is cut short, or holds what cannot be computed with."""
    with path.open("rb") as file:
        try:
            return Header(file, path.stat().st_size).tensors()
        except (struct.error, ValueError) as error:
            raise Damaged(f"{path.name} is no GGUF file that can be used: {error}.") from error


class Header:
    """Reads forward, a value at a time; every count has a bound, and every byte that is promised must be there."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self.file, self.size_bytes, self.alignment = file, size_bytes, ALIGNMENT

    def tensors(self) -> list[GgufTensor]:
        if self.file.read(4) != GGUF_MAGIC or self.number("I") not in GGUF_VERSIONS:
            raise ValueError("it does not begin as one of version 2 or 3")
        tensors, pairs = self.number("Q"), self.number("Q")
        if not 0 < tensors <= MAX_TENSORS or pairs > MAX_PAIRS:
            raise ValueError(f"it promises {tensors:,} tensors and {pairs:,} values")
        for _ in range(pairs):
            self.pair()
        found = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // self.alignment) * self.alignment
        end = start + max(offset + tensor.size_bytes for offset, tensor in found)
        if not end <= self.size_bytes < end + self.alignment:
            raise ValueError(f"it is {self.size_bytes:,} bytes, and its header promises {end:,}")
        return [tensor for _, tensor in found]

    def pair(self) -> None:
        """Only the alignment is of use here; what else a file says of itself is read over."""
        key, kind = self.text(), self.number("I")
        if key == ALIGNMENT_KEY and kind == 4:
            self.alignment = self.number("I")
            if not 8 <= self.alignment <= 1 << 16:
                raise ValueError(f"its alignment is {self.alignment}")
        else:
            self.skip(kind)

    def skip(self, kind: int, times: int = 1) -> None:
        if kind == TEXT:
            for _ in range(times):  # each takes bytes of the file, which ends
                self.text()
        elif kind == ARRAY and times == 1:
            self.skip(self.scalar_or_text(), self.number("Q"))
        else:
            size_bytes = struct.calcsize("<" + self.format(kind)) * times
            if size_bytes > self.size_bytes - self.file.tell():
                raise ValueError("it ends within a list")
            self.file.seek(size_bytes, 1)

    def scalar_or_text(self) -> int:
        kind = self.number("I")
        if kind == ARRAY:
            raise ValueError("it has a list of lists")
        return kind

    def tensor(self) -> tuple[int, GgufTensor]:
        """With its offset from where the tensors begin."""
        name, dimensions = self.text(), self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = [self.number("Q") for _ in range(dimensions)]
        number, offset = self.number("I"), self.number("Q")
        if number not in KINDS:
            raise ValueError(f"{name} is of kind {number}, which nothing here computes with")
        kind, group, group_bytes = KINDS[number]
        if shape[0] % group or offset % self.alignment:
            raise ValueError(f"{name} has rows of {shape[0]} elements, {kind} at {offset}")
        elements = prod(shape)
        return offset, GgufTensor(name, kind, elements, elements // group * group_bytes)

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"it has a text of {length:,} bytes")
        text = self.file.read(length)
        if len(text) < length:
            raise ValueError("it ends within a text")
        return text.decode("utf-8")

    def number(self, form: str) -> int:
        return int(struct.unpack("<" + form, self.file.read(struct.calcsize("<" + form)))[0])

    def format(self, kind: int) -> str:
        if kind not in SCALAR_FORMATS:
            raise ValueError(f"it has a value of type {kind}")
        return SCALAR_FORMATS[kind]


GGUF_SUFFIX = ".gguf"
WEIGHTS = (".safetensors", ".onnx", GGUF_SUFFIX)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets itself."""

FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ZIP = b"PK\x03\x04"
PICKLE_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
ONNX_VERSION_FIELD = b"\x08"
"""An ONNX file is a protobuf message whose first field, `ir_version`, is a number."""


def refuse_pickle_name(name: str) -> None:
    if name.lower().endswith(PICKLES):
        raise PickleRefused(f"{name} is a pickle, which can run any code when loaded. Use its safetensors instead.")


def check_content(path: Path, name: str) -> None:
    """Refuses a weights file that is not what its `name` says; `path` itself may be a `.part`."""
    if not name.endswith(WEIGHTS):
        return
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith((ZIP, *PICKLE_PROTOCOLS)):
        raise PickleRefused(
            f"{name} is a pickle under another name, which can run any code when loaded. It was refused."
        )
    if name.endswith(".safetensors"):
        safetensors_header(path)
    elif name.endswith(GGUF_SUFFIX):
        gguf_tensors(path)
    elif not start.startswith(ONNX_VERSION_FIELD):
        raise Damaged(f"{name} is not an ONNX file.")


def safetensors_header(path: Path) -> dict[str, Any]:
    """Each tensor's `dtype`, `shape` and `data_offsets`. Raises `Damaged` if the file is cut short.

    Format: https://huggingface.co/docs/safetensors/index#format
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise Damaged(f"{path.name} is not a safetensors file.")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path.name} is not a safetensors file.") from error
    if 8 + length + end != path.stat().st_size:
        raise Damaged(f"{path.name} is {path.stat().st_size:,} bytes, and its header promises {8 + length + end:,}.")
    return header


def loaded_bytes(path: Path, dtype: str) -> int:
    """What a weights file takes on a device: floating tensors at `dtype`, all others as stored."""
    if path.suffix == ".onnx":
        return path.stat().st_size
    return sum(tensor_bytes(tensor, dtype) for tensor in safetensors_header(path).values())


def tensor_bytes(tensor: dict[str, Any], dtype: str) -> int:
    if "F" in tensor["dtype"]:  # F64 F32 F16 BF16 F8_E4M3 F8_E5M2
        return prod(tensor["shape"]) * FLOAT_BYTES[dtype]
    start, end = tensor["data_offsets"]
    return end - start
