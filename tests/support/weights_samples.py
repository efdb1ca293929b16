"""Small weights for tests: real safetensors files in the layout of a Flux repository, and models to go with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pipelines.catalog.catalog import Credits, Model, Source


def tensors(seed: int, number: int = 2000) -> bytes:
    values = np.random.default_rng(seed).standard_normal(number).astype(np.float32)
    return save({"weight": values, "steps": np.array([seed], np.int64)})


def flux_repo(transformer: int, saved_by: str = "0.30") -> dict[str, bytes]:
    """Encoders and VAE are the same in each; only the transformer differs, and who saved the configurations."""
    config = json.dumps({"_diffusers_version": saved_by, "layers": 2}).encode()
    return {
        "model_index.json": json.dumps({"_class_name": "FluxPipeline"}).encode(),
        "flux1.safetensors": tensors(99),
        "README.md": b"# Flux",
        "transformer/config.json": config,
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": tensors(transformer),
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": tensors(transformer + 1),
        "transformer/diffusion_pytorch_model.safetensors.index.json": b"{}",
        "text_encoder/config.json": config,
        "text_encoder/model.safetensors": tensors(1),
        "text_encoder/model.fp16.safetensors": tensors(11),
        "text_encoder/pytorch_model.bin": b"\x80\x02}q\x00.",
        "text_encoder_2/config.json": config,
        "text_encoder_2/model.safetensors": tensors(2),
        "tokenizer_2/spiece.model": b"pieces",
        "tokenizer/merges.txt": b"a b",
        "vae/config.json": config,
        "vae/diffusion_pytorch_model.safetensors": tensors(3),
    }


KEPT = [
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def a_model(name: str = "flux-test", weights: Source | None = None, **changes: Any) -> Model:
    values: dict[str, Any] = {
        "name": name,
        "kind": "image",
        "family": "flux",
        "workflows": ("text-to-image",),
        "credits": Credits(1),
        "licence": "Apache-2.0",
        "dtype": "bfloat16",
        "weights": weights or Source("hf", repo=f"plantain/{name}", skip=("flux1.safetensors",)),
    }
    return Model(id=name, **{**values, **changes})


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
