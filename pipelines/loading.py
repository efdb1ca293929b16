"""Loads components and tokenizers with diffusers and transformers, from local safetensors and GGUF files only."""

import importlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from pipelines.base import Component, FileFingerprint, Loader, UnusableWeights, Weights
from pipelines.quantization import apply_fp8_casting
from pipelines.weights.errors import Damaged
from pipelines.weights.formats import gguf_tensors
from pipelines.weights.sizes import GGUF, NF4

LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes a folder's `model_index.json` may name."""


def subprocess_loader(weights: Weights, device: torch.device) -> Loader:
    """The `loader` of families that load with `load_component`: beside a run, that takes a subprocess."""
    return Loader(load_component, needs_subprocess=True)


def load_component(component: Component) -> torch.nn.Module:
    """One component of a diffusers folder, on the host, in its dtype, for inference.

    Raises `UnusableWeights`, naming the file, if one is missing, truncated or does not fit the config.
    """
    quiet()
    if component.storage == GGUF:
        return load_gguf(component)
    check_files(component.path)
    check_fingerprints(component)
    model_class = class_of(component.path.parent, component.path.name)
    dtype = getattr(torch, component.dtype)
    try:
        module, report = model_class.from_pretrained(
            component.path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnusableWeights(f"{component.path}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise UnusableWeights(f"{component.path}: {len(missing)} tensors are missing, such as {missing[0]}")
    if component.storage == NF4:
        from pipelines.quantization import quantize_nf4  # bitsandbytes is optional

        quantize_nf4(module, dtype)
    elif component.storage:
        apply_fp8_casting(module, getattr(torch, component.storage), dtype)
    return module.eval().requires_grad_(False)


def load_gguf(component: Component) -> torch.nn.Module:
    """A denoiser from one GGUF file, with the configuration of the component that it replaces. Raises the same."""
    check_fingerprints(component)
    config, dtype = component.config or component.path, getattr(torch, component.dtype)
    try:
        gguf_tensors(component.path)  # checks sizes and counts, which the gguf package does not
        module = class_of(config.parent, config.name).from_single_file(
            str(component.path),
            config=str(config.parent),
            subfolder=config.name,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, LookupError, Damaged) as error:
        raise UnusableWeights(f"{component.path}: {error}") from error
    if missing := [name for name, tensor in module.named_parameters() if tensor.is_meta]:
        raise UnusableWeights(f"{component.path}: {len(missing)} tensors are missing, such as {missing[0]}")
    for name, tensor in module.named_parameters():
        if not tensor.is_floating_point() and not name.endswith(".weight"):
            raise UnusableWeights(f"{component.path}: {name} is quantised, but not a matrix")
    return module.eval().requires_grad_(False)


def load_small(folder: Path, name: str) -> Any:
    """A tokenizer, feature extractor or noise scheduler: a few megabytes that stay on the host."""
    quiet()
    try:
        return class_of(folder, name).from_pretrained(folder / name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"{folder / name}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"{path}: {error}") from error


def architecture_of(weights: Weights) -> str:
    """The class name of the diffusers pipeline that the weights are for."""
    return weights.architecture or str(read_json(weights.folder / "model_index.json").get("_class_name"))


def class_of(folder: Path, name: str) -> Any:
    """The class that the folder's `model_index.json` names for one of its subfolders."""
    index = folder / "model_index.json"
    library, class_name = read_json(index).get(name) or (None, None)
    found = getattr(importlib.import_module(library), str(class_name), None) if library in LIBRARIES else None
    if found is None:
        raise UnusableWeights(f"{index}: no class for {name} in {' or '.join(LIBRARIES)}")
    return found


def check_files(folder: Path) -> None:
    """Raises `UnusableWeights` unless every safetensors file exists and has the length that its header states.

    Hashes are checked by `plantain verify`.
    """
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files |= {folder / name for name in read_json(index)["weight_map"].values()}
    if not files:
        raise UnusableWeights(f"{folder}: no safetensors file")
    for file in sorted(files):
        try:
            safe_open(file, framework="pt").__exit__(None, None, None)
        except (OSError, SafetensorError) as error:
            raise UnusableWeights(f"{file}: {error}") from error


def check_fingerprints(component: Component) -> None:
    """Raises `UnusableWeights` if a file was changed since the component's key was computed."""
    folder = component.path if component.path.is_dir() else component.path.parent
    for fingerprint in component.fingerprints:
        file = folder / fingerprint.name
        if FileFingerprint.of(file) != fingerprint:
            raise UnusableWeights(
                f"{file} was replaced or removed while the server ran. `plantain verify` shows whether it is what was "
                "installed; the server must be restarted to use it."
            )


def quiet() -> None:
    """Disables progress bars, and warnings, in which both libraries quote prompts: a worker's output is a log."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
