"""Matrices kept in 4 bits (nf4) by bitsandbytes, made from the plain weights when they are loaded.

diffusers' own quantiser for this wants a GPU, and leaves all of the model on it before it was counted. Here one layer
at a time is quantised, where there is a GPU on that, and all that a layer then needs lies among its parameters and
buffers, so that it is packed and moved as any other.
"""
# FROM pipelines.casting: Matrices kept in 8 bits and widened one layer at a time: diffusers' layerwise casting, made fit for packed weights.  diffusers narrows each weight again after use, into new memory; here the narrow one stays where it is and is pointed at again. Both give the same bits, since widening loses nothing.

from typing import Any

import bitsandbytes
import torch
from diffusers.hooks import apply_layerwise_casting

from pipelines.weights.sizes import NF4_GROUP, is_kept_wide, not_cast

HOOK = "layerwise_casting"


def apply_fp8_casting(module: torch.nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    """Narrow the module's linear, convolution and embedding layers to `storage`, but for those of `not_cast`."""
    apply_layerwise_casting(module, storage, compute, skip_modules_pattern=not_cast(type(module).__name__))
    for layer in module.modules():
        hook = getattr(layer, "_diffusers_hook", None)
        if hook is not None and (cast := hook.get_hook(HOOK)) is not None:
            widened = UpcastHook(compute)
            cast.fn_ref.pre_forward, cast.fn_ref.post_forward = widened.enter, widened.leave


class UpcastHook:
    """One layer's tensors, wide while it runs."""

    def __init__(self, compute: torch.dtype) -> None:
        self._compute = compute
        self._narrow: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enter(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.narrow()  # a run that raised inside left it wide
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            self._narrow.append((tensor, tensor.data))
            tensor.data = tensor.data.to(self._compute)
        return args, kwargs

    def leave(self, layer: torch.nn.Module, output: Any) -> Any:
        self.narrow()
        return output

    def narrow(self) -> None:
        """Point at the narrow tensors again, but for those that were pointed elsewhere meanwhile: moved weights."""
        while self._narrow:
            tensor, narrow = self._narrow.pop()
            if tensor.dtype == self._compute:
                tensor.data = narrow


def quantize_nf4(module: torch.nn.Module, compute: torch.dtype) -> None:
    """Quantise the linear layers, but for those that diffusers keeps in float32 (see `sizes.nf4_layers`)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code: list[torch.Tensor] = []
    for name, layer in list(module.named_modules()):
        if type(layer) is torch.nn.Linear and not is_kept_wide(name, type(module).__name__):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, quantised(layer, compute, device, code))


def quantised(
    layer: torch.nn.Linear, compute: torch.dtype, device: str, code: list[torch.Tensor]
) -> bitsandbytes.nn.Linear4bit:
    """The layer on the host. `code` holds the table of the 16 values once it is known: all layers share it."""
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        False,
        compute,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, blocksize=NF4_GROUP, compress_statistics=False, quant_type="nf4"
    )
    made.weight = weight.to(device).to("cpu")
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = False  # else it lays its weights out anew, outside of the buffer
    state = made.weight.quant_state
    code[:] = code or [state.code]
    state.code = code[0]
    made.register_buffer("absmax", state.absmax, persistent=False)
    made.register_buffer("code", state.code, persistent=False)
    return made
