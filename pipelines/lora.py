"""Applies LoRAs to a denoiser for one run and removes them afterwards. The denoiser's own weights do not change."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipelines.base import UnusableWeights
from pipelines.loading import check_fingerprints
from pipelines.params import AppliedLora

PREFIX = "transformer."
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
"""Names of a LoRA's tensors. Kinds that change the layers themselves (control, LoKr, DoRA) have others."""


@contextmanager
def apply_loras(pipe: Any, loras: Sequence[AppliedLora], device: torch.device) -> Iterator[None]:
    """Within the block, the LoRAs are applied to `pipe.transformer`: peft wraps each layer that they change.

    One with scale 0 is not loaded. Raises `UnusableWeights`, naming the LoRA, if one is not for this model.
    """
    loras = [lora for lora in loras if lora.scale]
    if not loras:
        yield
        return
    names = [f"lora_{number}" for number in range(len(loras))]  # an id may contain a dot, which peft refuses
    try:
        with torch.inference_mode(False), torch.no_grad():
            for name, lora in zip(names, loras, strict=True):
                load(pipe, lora, name)
            pipe.set_adapters(names, [lora.scale for lora in loras])
            pipe.set_lora_device(names, device)  # also for streamed blocks, which are in host memory now
            pipe.transformer.eval()
        yield
    finally:
        pipe.transformer.unload_lora()


def load(pipe: Any, lora: AppliedLora, name: str) -> None:
    """Loads a LoRA with diffusers, after checking that it only adds to the outputs of layers."""
    component = lora.weights
    if component is None:
        raise UnusableWeights(f"LoRA {lora.id}: its file is missing")
    check_fingerprints(component)
    options = {"weight_name": component.path.name, "local_files_only": True, "use_safetensors": True}
    try:
        check_kind(component.path)
        check(pipe.transformer, pipe.lora_state_dict(component.path.parent, **options))
        with warnings.catch_warnings(action="ignore"):  # about several at once, and about layers without one
            pipe.load_lora_weights(component.path.parent, adapter_name=name, **options)
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnusableWeights(f"LoRA {lora.id} does not fit this model: {error}") from error


def check_kind(path: Path) -> None:
    """Raises `ValueError` for a DoRA: diffusers would leave out its magnitudes, with only a warning."""
    with safe_open(path, framework="pt") as file:
        if other := next((name for name in file.keys() if "dora_scale" in name or "magnitude" in name), None):  # noqa: SIM118
            raise ValueError(f"{other} is not part of a plain LoRA")


def check(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` unless the tensors are pairs of matrices for layers of the denoiser, of the right shapes."""
    check_names(name for name in tensors if not name.endswith(".alpha"))
    layers = dict(network.named_modules())
    for name, tensor in tensors.items():
        if not name.endswith(PARTS):
            continue
        path, part = name.removeprefix(PREFIX).rsplit(".lora_", 1)
        side, wanted = (1, "in_features") if part == "A.weight" else (0, "out_features")
        if tensor.shape[side] != getattr(layers.get(path), wanted, None):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but the model has no layer {path} of that size")


def check_names(names: Iterable[str]) -> None:
    names = list(names)
    if other := next((name for name in names if not name.startswith(PREFIX)), None):
        raise ValueError(f"it also changes {other}; only LoRAs for the denoiser alone are supported")
    if other := next((name for name in names if not name.endswith(PARTS)), None):
        raise ValueError(f"{other} is not part of a plain LoRA")
    if not names:
        raise ValueError("the file has no LoRA")
