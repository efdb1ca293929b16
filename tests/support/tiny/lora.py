"""LoRAs for the tiny models, as diffusers writes them: every attention projection and feed-forward, from a seed."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, LTXConditionPipeline, WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import video as tiny_video

FLUX_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "proj_out", "x_embedder"]
WAN_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
LTX_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def make_flux_lora(path: Path, seed: int, rank: int = 2, single_layers: int = 1) -> Path:
    return save(path, FluxPipeline, tiny_flux.flux_transformer("dev", single_layers), FLUX_LAYERS, seed, rank)


def make_wan_lora(path: Path, seed: int, rank: int = 2) -> Path:
    return save(path, WanPipeline, tiny_video.wan_transformer("t2v"), WAN_LAYERS, seed, rank)


def make_ltx_lora(path: Path, seed: int, rank: int = 2) -> Path:
    return save(path, LTXConditionPipeline, tiny_video.ltx_transformer(), LTX_LAYERS, seed, rank)


def save(path: Path, pipeline: Any, network: Any, layers: list[str], seed: int, rank: int) -> Path:
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    tensors = get_peft_model_state_dict(network)
    random = torch.Generator().manual_seed(seed)
    made = {name: 0.3 * torch.randn(tensor.shape, generator=random) for name, tensor in tensors.items()}
    pipeline.save_lora_weights(path.parent, transformer_lora_layers=made, weight_name=path.name)
    return path
