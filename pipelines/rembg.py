"""rembg: a picture without its background, by rembg's own library, one of its sessions kept open per model."""

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

# rembg imports an alpha matting that is not used here and that numba compiles at import: for a minute, where no earlier
# import could leave its work in the package's folder. Without numba's compiler the import takes its 2 to 4 seconds.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

REFUSALS = (NoSuchFile, InvalidProtobuf, InvalidGraph, InvalidArgument)
"""What onnxruntime raises for a file; other errors are the device's."""


def build(weights: Weights, residency: Residency) -> "Rembg":
    """The adapter for one model; its session is opened when a run needs it."""
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
        """RGBA of the input's size, exactly what `rembg.remove` makes: the input, alpha too, times the mask.

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
    """rembg's session of that name, which knows the network's size and normalisation, on the ONNX file at `path`.

    Raises `UnusableWeights` for a name that rembg does not know, and for a file that is no ONNX network.
    """
    if model not in sessions:
        raise UnusableWeights(f"rembg knows no model {model}; it knows {', '.join(sorted(sessions))}")
    wanted = providers(device)
    try:
        session = local(sessions[model], path)(model, session_options(), providers=wanted)
    except REFUSALS as error:
        raise UnusableWeights(f"{path}: {error}") from error
    if wanted[0] not in session.inner_session.get_providers():  # onnxruntime itself goes to the CPU with a warning
        raise RuntimeError(f"onnxruntime cannot use {wanted[0]}; its log says which library is missing")
    return session


def local(session: type, path: Path) -> type:
    """The session class with the file given, where rembg's own would look in the home folder and download."""
    return type(session.__name__, (session,), {"download_models": classmethod(lambda cls, *args, **kwargs: str(path))})


def session_options() -> onnxruntime.SessionOptions:
    """As `rembg.new_session` sets them: `OMP_NUM_THREADS` threads, or onnxruntime's choice.

    onnxruntime's memory arena stays: a network's input has one size, so it does not grow (u2netp: as much after 200
    pictures of different sizes as after 10). Without it u2netp takes 0.46 GB less, and nearly three times as long.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    return options


def providers(device: torch.device) -> list[str]:
    """CUDA with the libraries that torch's wheels brought, or the CPU. A worker sees one GPU: onnxruntime's first."""
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    onnxruntime.preload_dlls()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
