"""LoRAs on a denoiser for one run: its own weights stay where and as they are, and it is itself again afterwards."""

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
"""What a LoRA is made of. Kinds that need the layers themselves changed (control, LoKr, DoRA) have other parts."""


@contextmanager
def apply_loras(pipe: Any, loras: Sequence[AppliedLora], device: torch.device) -> Iterator[None]:
    """While inside, `pipe.transformer` wears these. peft puts a layer around each one that they change.

    Raises `UnusableWeights`, naming the LoRA, where one is not for this model. With scale 0 it is not worn at all.
    """
    loras = [lora for lora in loras if lora.scale]
    if not loras:
        yield
        return
    names = [f"lora_{number}" for number in range(len(loras))]  # an id may hold a point, which peft refuses
    try:
        with torch.inference_mode(False), torch.no_grad():
            for name, lora in zip(names, loras, strict=True):
                load(pipe, lora, name)
            pipe.set_adapters(names, [lora.scale for lora in loras])
            pipe.set_lora_device(names, device)  # a block that is streamed lies in host memory now, its LoRA does not
            pipe.transformer.eval()
        yield
    finally:
        pipe.transformer.unload_lora()


def load(pipe: Any, lora: AppliedLora, name: str) -> None:
    """As diffusers loads it, once it is known to change nothing but what layers add to their outputs."""
    component = lora.weights
    if component is None:
        raise UnusableWeights(f"LoRA {lora.id}: no file was given for it")
    check_fingerprints(component)
    options = {"weight_name": component.path.name, "local_files_only": True, "use_safetensors": True}
    try:
        check_kind(component.path)
        check(pipe.transformer, pipe.lora_state_dict(component.path.parent, **options))
        with warnings.catch_warnings(action="ignore"):  # of several at once, and of those not for every layer
            pipe.load_lora_weights(component.path.parent, adapter_name=name, **options)
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnusableWeights(f"LoRA {lora.id} does not go with this model: {error}") from error


def check_kind(path: Path) -> None:
    """Raises `ValueError` for a DoRA: what makes it one would be left out by diffusers, with no more than a warning."""
    with safe_open(path, framework="pt") as file:
        if other := next((name for name in file.keys() if "dora_scale" in name or "magnitude" in name), None):  # noqa: SIM118
            raise ValueError(f"{other} is no part of a plain LoRA")


def check(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` unless these are pairs of matrices for layers of the denoiser, in the layers' sizes."""
    check_names(name for name in tensors if not name.endswith(".alpha"))
    layers = dict(network.named_modules())
    for name, tensor in tensors.items():
        if not name.endswith(PARTS):
            continue
        path, part = name.removeprefix(PREFIX).rsplit(".lora_", 1)
        side, wanted = (1, "in_features") if part == "A.weight" else (0, "out_features")
        if tensor.shape[side] != getattr(layers.get(path), wanted, None):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and {path} of the model is no layer of that size")


def check_names(names: Iterable[str]) -> None:
    names = list(names)
    if other := next((name for name in names if not name.startswith(PREFIX)), None):
        raise ValueError(f"it also changes {other}, and only a LoRA of the denoiser alone can be used")
    if other := next((name for name in names if not name.endswith(PARTS)), None):
        raise ValueError(f"{other} is no part of a plain LoRA")
    if not names:
        raise ValueError("it holds no LoRA")
