"""Matrices kept in 8 bits and widened one layer at a time: diffusers' layerwise casting, made fit for packed weights.

diffusers narrows each weight again after use, into new memory; here the narrow one stays where it is and is pointed at
again. Both give the same bits, since widening loses nothing.
"""

from typing import Any

import torch
from diffusers.hooks import apply_layerwise_casting

from pipelines.sizes import not_cast

HOOK = "layerwise_casting"


def keep_small(module: torch.nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    """Narrow the module's linear, convolution and embedding layers to `storage`, but for those of `not_cast`."""
    apply_layerwise_casting(module, storage, compute, skip_modules_pattern=not_cast(type(module).__name__))
    for layer in module.modules():
        hook = getattr(layer, "_diffusers_hook", None)
        if hook is not None and (cast := hook.get_hook(HOOK)) is not None:
            widened = Widened(compute)
            cast.fn_ref.pre_forward, cast.fn_ref.post_forward = widened.enter, widened.leave


class Widened:
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
