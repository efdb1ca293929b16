"""More blocks for a transformer that has learned already."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from diffusers import ModelMixin
from torch import nn

Transformer = TypeVar("Transformer", bound=ModelMixin)

LASTS = ("attn.to_out.0", "attn.to_add_out", "attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "ff_context.net.2")
"""The layers by which a block of Flux's or LTX's adds to what it is given."""


def deepened(transformer: Transformer, option: str, at: int, count: int) -> Transformer:
    """The same function with `count` of `transformer_blocks`, which `option` of its config counts.

    Those that it lacks do nothing yet; they are put in before the block numbered `at`.
    """
    blocks = transformer.get_submodule("transformer_blocks")
    assert isinstance(blocks, nn.ModuleList)
    missing = count - len(blocks)
    torch.manual_seed(15)
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    deeper = type(transformer)(**config | {option: count})
    for name, weight in transformer.state_dict().items():
        deeper.get_parameter(moved(name, at, missing)).data.copy_(weight)
    for new in range(at, at + missing):
        for layer in lasts(deeper.get_submodule(f"transformer_blocks.{new}")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return deeper


def moved(name: str, at: int, by: int) -> str:
    """The name of a weight, with the numbers of the blocks from `at` on raised."""
    first, _, rest = name.removeprefix("transformer_blocks.").partition(".")
    if not name.startswith("transformer_blocks.") or int(first) < at:
        return name
    return f"transformer_blocks.{int(first) + by}.{rest}"


def lasts(block: nn.Module) -> Iterable[nn.Linear]:
    return [module for name, module in block.named_modules() if name in LASTS and isinstance(module, nn.Linear)]
