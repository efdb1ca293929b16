"""The kinds of weights file that are loaded, and how to tell them from a pickle.

safetensors and ONNX; and GGUF, where `weights.toml` names the very file. All three are data: loading them runs no code.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from pipelines.weights.errors import Damaged, PickleRefused
from pipelines.weights.gguf_file import gguf_tensors

GGUF = ".gguf"
WEIGHTS = (".safetensors", ".onnx", GGUF)
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
    elif name.endswith(GGUF):
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
