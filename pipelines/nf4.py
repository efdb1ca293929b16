"""Matrices kept in 4 bits (nf4) by bitsandbytes, made from the plain weights when they are loaded.

diffusers' own quantiser for this wants a GPU, and leaves all of the model on it before it was counted. Here one layer
at a time is quantised, where there is a GPU on that, and all that a layer then needs lies among its parameters and
buffers, so that it is packed and moved as any other.
"""

import bitsandbytes
import torch

from pipelines.sizes import NF4_GROUP, is_kept_wide


def keep_nf4(module: torch.nn.Module, compute: torch.dtype) -> None:
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
