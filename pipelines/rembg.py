"""Background removal with the rembg library. Each model's ONNX session is a component."""

import os
from pathlib import Path
from typing import Any

import onnxruntime
import rembg
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile
from PIL import Image
from rembg.sessions import sessions

from pipelines.base import Component, Loader, OnStep, UnusableWeights, Weights
from pipelines.media.images import open_image
from pipelines.params import RemoveBackground
from pipelines.residency.residency import Residency

# rembg imports an alpha matting, not used here, which numba compiles at import: a minute, unless the result is
# cached in the package's folder. Without numba's compiler, the import takes 2 to 4 seconds.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

REFUSALS = (NoSuchFile, InvalidProtobuf, InvalidGraph, InvalidArgument)
"""Errors that onnxruntime raises for an unusable file; others concern the device."""


def build(weights: Weights, residency: Residency) -> "Rembg":
    """The adapter for one model. Opens no session; runs do."""
    return Rembg(weights, residency)


def loader(weights: Weights, device: torch.device) -> Loader:
    """rembg's session, opened on the device."""
    return Loader(lambda component: open_session(weights.model, component.path, device), returns_module=False)


class Rembg:
    """One of rembg's models: a single component, `network`, in one ONNX file."""

    def __init__(self, weights: Weights, residency: Residency) -> None:
        self._model = weights.model
        self._component = weights.component("network")
        self._residency = residency

    def generate(self, params: RemoveBackground, on_step: OnStep) -> Image.Image:
        """The input as RGBA, with alpha multiplied by the mask: exactly the output of `rembg.remove`.

        Raises `InvalidInput` for an unusable file, and whatever `on_step` raises.
        """
        image = open_image(params.image)
        session = self._residency.acquire(self._component, self._open)
        on_step("remove-bg", 0, 1)
        cutout = rembg.remove(image, session=session)
        on_step("remove-bg", 1, 1)
        return cutout

    def _open(self, component: Component) -> Any:
        return open_session(self._model, component.path, self._residency.device)


def open_session(model: str, path: Path, device: torch.device) -> Any:
    """rembg's session class for the model, which has the network's size and normalisation, on the ONNX file `path`.

    Raises `UnusableWeights` if rembg has no model of that name, or the file is not an ONNX network.
    """
    if model not in sessions:
        raise UnusableWeights(f"rembg has no model {model}; it has {', '.join(sorted(sessions))}")
    preferred = providers(device)
    try:
        session = with_local_file(sessions[model], path)(model, session_options(), providers=preferred)
    except REFUSALS as error:
        raise UnusableWeights(f"{path}: {error}") from error
    if preferred[0] not in session.inner_session.get_providers():  # else onnxruntime uses the CPU, with a warning
        raise RuntimeError(f"onnxruntime cannot use {preferred[0]}; its log says which library is missing")
    return session


def with_local_file(session: type, path: Path) -> type:
    """The session class, but for this file; rembg's own would look in the home folder, and download."""
    return type(session.__name__, (session,), {"download_models": classmethod(lambda cls, *args, **kwargs: str(path))})


def session_options() -> onnxruntime.SessionOptions:
    """As `rembg.new_session` sets them: `OMP_NUM_THREADS` threads, or onnxruntime's choice.

    onnxruntime's memory arena stays enabled: a network's input has one size, so the arena does not grow (measured with
    u2netp, 200 pictures of different sizes). Without it u2netp takes 0.46 GB less, but nearly three times as long.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    return options


def providers(device: torch.device) -> list[str]:
    """CUDA, with the libraries of torch's wheels, or the CPU. A worker sees one GPU, which is onnxruntime's first."""
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    onnxruntime.preload_dlls()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
