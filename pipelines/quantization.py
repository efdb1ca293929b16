"""Quantisation of weights: fp8 storage (diffusers' layerwise casting) and nf4 (bitsandbytes), made fit for packing.

All that a quantised layer needs is in its parameters and buffers, so it is packed and moved as any other.
"""

from typing import Any

import bitsandbytes
import torch
from diffusers.hooks import apply_layerwise_casting

from pipelines.weights.sizes import NF4_GROUP, is_kept_wide, not_cast

HOOK = "layerwise_casting"


def apply_fp8_casting(module: torch.nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    """Casts linear, convolution and embedding layers to `storage`, except those of `not_cast`.

    diffusers casts each weight back after use, into new memory. Here the stored one remains where it is, and the layer
    points at it again; outputs are the same bits, since upcasting loses nothing.
    """
    apply_layerwise_casting(module, storage, compute, skip_modules_pattern=not_cast(type(module).__name__))
    for layer in module.modules():
        hook = getattr(layer, "_diffusers_hook", None)
        if hook is not None and (cast := hook.get_hook(HOOK)) is not None:
            upcast = UpcastHook(compute)
            cast.fn_ref.pre_forward, cast.fn_ref.post_forward = upcast.enter, upcast.leave


class UpcastHook:
    """Upcasts one layer's tensors to the dtype that computes, while the layer runs."""

    def __init__(self, compute: torch.dtype) -> None:
        self._compute = compute
        self._stored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enter(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.restore()  # a run that raised inside the layer left it upcast
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            self._stored.append((tensor, tensor.data))
            tensor.data = tensor.data.to(self._compute)
        return args, kwargs

    def leave(self, layer: torch.nn.Module, output: Any) -> Any:
        self.restore()
        return output

    def restore(self) -> None:
        """Points the tensors at the stored weights again, except those that were moved to another buffer meanwhile."""
        while self._stored:
            tensor, stored = self._stored.pop()
            if tensor.dtype == self._compute:
                tensor.data = stored


def quantize_nf4(module: torch.nn.Module, compute: torch.dtype) -> None:
    """Quantises the linear layers, except those that diffusers keeps in float32 (see `sizes.nf4_layers`).

    diffusers' own quantiser needs a GPU, and leaves the whole model there before its memory was reserved. This one
    quantises one layer at a time, on the GPU if there is one, and returns it to the host.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code: list[torch.Tensor] = []
    for name, layer in list(module.named_modules()):
        if type(layer) is torch.nn.Linear and not is_kept_wide(name, type(module).__name__):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, quantised(layer, compute, device, code))


def quantised(
    layer: torch.nn.Linear, compute: torch.dtype, device: str, code: list[torch.Tensor]
) -> bitsandbytes.nn.Linear4bit:
    """The quantised layer, on the host. `code` is filled with the table of 16 values, which all layers share."""
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
    made.support_avx512bf16_for_cpu = (
        False  # else bitsandbytes re-arranges the weights in new memory, outside of the buffer
    )
    state = made.weight.quant_state
    code[:] = code or [state.code]
    state.code = code[0]
    made.register_buffer("absmax", state.absmax, persistent=False)
    made.register_buffer("code", state.code, persistent=False)
    return made
