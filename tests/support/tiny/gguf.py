"""Tiny denoisers in GGUF files, written and quantised by the gguf package."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

Tensors = Mapping[str, torch.Tensor]


def tensors_of(component: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in component.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_gguf(path: Path, tensors: Tensors, *kinds: Kind, plain: Kind = Kind.F32) -> Path:
    """Each matrix in the first of `kinds` whose group size divides its rows; all other tensors as `plain`."""
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_array("general.tags", ["tiny", "test"])
    writer.add_array("numbers", [1, 2, 3])
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        row = values.shape[-1]
        fit = [kind for kind in kinds if values.ndim == 2 and row % gguf.GGML_QUANT_SIZES[kind][0] == 0]
        if fit:
            writer.add_tensor(name, gguf.quants.quantize(values, fit[0]), raw_dtype=fit[0])
        else:
            writer.add_tensor(name, values.astype("float16" if plain == Kind.F16 else "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
