"""What a component takes on a device, by tensor, from the headers of its files alone: nothing is loaded."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipelines.weights.formats import safetensors_header, tensor_bytes

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

FP8 = "float8_e4m3fn"
QUANTISED = ("transformer", "transformer_2")


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
    blocks: dict[tuple[str, int], int] = defaultdict(int)
    total_bytes = 0
    for path, tensor in tensors:
        size = loaded_size(path, tensor, dtype, class_name, path.rpartition(".")[0] in small)
        total_bytes += size
        if block := block_of(path):
            blocks[block] += size
    return Sizes(total_bytes, tuple(blocks.values()) if name in STREAMABLE else ())


def loaded_size(path: str, tensor: Mapping[str, Any], dtype: str, class_name: str, is_small: bool) -> int:
    if is_small:
        return prod(tensor["shape"])
    kept = set(path.split(".")) & set(FLOAT32_PARTS.get(class_name, ()))
    return tensor_bytes(dict(tensor), "float32" if kept else dtype)


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
