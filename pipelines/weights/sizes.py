"""What a component takes on a device, by tensor, from the headers of its files alone: nothing is loaded."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipelines.weights.formats import FLOAT_BYTES, gguf_tensors, safetensors_header, tensor_bytes

STREAMABLE = ("transformer", "transformer_2", "text_encoder", "text_encoder_2")
"""Components whose blocks are run one after the other, by calling them: what streaming hooks into."""

WAN_FLOAT32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
FLOAT32_PARTS: Mapping[str, tuple[str, ...]] = {
    "WanTransformer3DModel": WAN_FLOAT32,
    "WanVACETransformer3DModel": WAN_FLOAT32,
}
"""By class, names in a tensor's path that diffusers loads in float32 whatever the dtype (`_keep_in_fp32_modules`)."""

NOT_CAST = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
NOT_CAST_BY_CLASS: Mapping[str, tuple[str, ...]] = {
    "WanTransformer3DModel": ("patch_embedding", "condition_embedder", *WAN_FLOAT32),
    "WanVACETransformer3DModel": ("patch_embedding", "vace_patch_embedding", "condition_embedder", *WAN_FLOAT32),
}
"""Patterns of layers that stay in the dtype they are computed in: diffusers' own defaults for layerwise casting."""

FP8, NF4, GGUF = "float8_e4m3fn", "nf4", "gguf"
STORAGES = {"fp8-layerwise": FP8, "nf4": NF4}
"""What the denoiser's matrices are kept as, by the `quantisation` that says so; `gguf` is another file's."""
QUANTISED = ("transformer", "transformer_2")
NF4_GROUP, NF4_VALUES = 64, 16
"""Elements that share a scale of 4 bytes; values that 4 bits choose from, in one table of float32."""

ORIGINAL_NAMES = {"time_embedding": "time_embedder", "modulation": "scale_shift_table"}
"""Names that Wan's makers have for what diffusers keeps in float32: GGUF files have theirs."""


@dataclass(frozen=True)
class Sizes:
    """`block_bytes` are those of each block in the order of their names, empty for what cannot be streamed."""

    weights_bytes: int
    block_bytes: tuple[int, ...] = ()


def sizes_of(name: str, files: Sequence[Path], dtype: str, class_name: str = "", storage: str | None = None) -> Sizes:
    """Of the component `name`. Raises `Damaged` for a file that is cut short."""
    if any(file.suffix == ".onnx" for file in files):
        return Sizes(sum(file.stat().st_size for file in files))
    tensors = [entry for file in files for entry in safetensors_header(file).items()]
    small = cast_layers(tensors, class_name) if storage == FP8 else frozenset()
    coarse = nf4_layers(tensors, class_name) if storage == NF4 else frozenset()
    blocks: dict[tuple[str, int], int] = defaultdict(int)
    total_bytes = 4 * NF4_VALUES if coarse else 0
    for path, tensor in tensors:
        layer = path.rpartition(".")[0]
        if layer in coarse and path.endswith(".weight"):
            size = nf4_bytes(prod(tensor["shape"]))
        else:
            size = loaded_size(path, tensor, dtype, class_name, layer in small)
        total_bytes += size
        if block := block_of(path):
            blocks[block] += size
    return Sizes(total_bytes, tuple(blocks.values()) if name in STREAMABLE else ())


def loaded_size(path: str, tensor: Mapping[str, Any], dtype: str, class_name: str, is_small: bool) -> int:
    if is_small:
        return prod(tensor["shape"])
    return tensor_bytes(dict(tensor), "float32" if is_kept_wide(path, class_name) else dtype)


def gguf_sizes(file: Path, dtype: str, class_name: str) -> Sizes:
    """Of a denoiser in one GGUF file. Quantised tensors stay as they are, plain ones come in `dtype`.

    Raises `Damaged` for a file that is no such thing.
    """
    blocks: dict[tuple[str, int], int] = defaultdict(int)
    total_bytes = 0
    for tensor in gguf_tensors(file):
        if is_kept_wide(".".join(ORIGINAL_NAMES.get(part, part) for part in tensor.name.split(".")), class_name):
            size = tensor.elements * FLOAT_BYTES["float32"]
        else:
            size = tensor.elements * FLOAT_BYTES[dtype] if tensor.kind in ("F32", "F16") else tensor.size_bytes
        total_bytes += size
        if block := block_of(tensor.name):
            blocks[block] += size
    return Sizes(total_bytes, tuple(blocks.values()))


def is_kept_wide(path: str, class_name: str) -> bool:
    return not set(path.split(".")).isdisjoint(FLOAT32_PARTS.get(class_name, ()))


def nf4_layers(tensors: Sequence[tuple[str, Any]], class_name: str) -> frozenset[str]:
    """Linear layers: what a denoiser has of two dimensions and calls a weight."""
    layers = (
        path.removesuffix(".weight") for path, each in tensors if path.endswith(".weight") and len(each["shape"]) == 2
    )
    return frozenset(layer for layer in layers if not is_kept_wide(layer, class_name))


def nf4_bytes(elements: int) -> int:
    """Two elements a byte, and the scales of their groups."""
    return -(-elements // 2) + 4 * -(-elements // NF4_GROUP)


def cast_layers(tensors: Sequence[tuple[str, Any]], class_name: str) -> frozenset[str]:
    """Layers kept in 8 bits: linear, convolution and embedding, which have a weight of two dimensions or more."""
    layers = {path.removesuffix(".weight") for path, each in tensors if is_matrix(path, each)}
    return frozenset(layer for layer in layers if not any(re.search(each, layer) for each in not_cast(class_name)))


def is_matrix(path: str, tensor: Mapping[str, Any]) -> bool:
    return path.endswith(".weight") and len(tensor["shape"]) > 1


def not_cast(class_name: str) -> tuple[str, ...]:
    return NOT_CAST + NOT_CAST_BY_CLASS.get(class_name, ())


def block_of(path: str) -> tuple[str, int] | None:
    """`blocks.3.norm.weight` -> (`blocks`, 3): the outermost list, and the place in it."""
    found = re.match(r"((?:[^.\d][^.]*\.)*?)(\d+)\.", path)
    return (found[1], int(found[2])) if found else None


def class_of_config(folder: Path) -> str:
    """What diffusers' `config.json` names; empty where there is none, as for transformers' classes."""
    config = folder / "config.json"
    return str(json.loads(config.read_text("utf-8")).get("_class_name", "")) if config.is_file() else ""
