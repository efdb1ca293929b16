"""Networks of the real classes and sizes with random weights, for benchmarks. Never zeros: they flatter by 13 %.

Configs: the models' own `config.json` at their makers' pages, less what is diffusers' default.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "flux-schnell": (FluxTransformer2DModel, {"guidance_embeds": False}),
    "wan-14b": (WanTransformer3DModel, {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}),
    "wan-1.3b": (WanTransformer3DModel, {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}),
    "flux-1gb": (FluxTransformer2DModel, {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 1}),
}
"""`flux-1gb` has one block of each kind, at full width: about 1 GB."""


def random_module(name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The denoiser of that name on the host, its weights drawn from N(0, 0.02)."""
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        module = torch.nn.Module.to(kind(**config), dtype)  # diffusers' own `to` warns of a cast that is meant
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02, generator=generator)
    return module
