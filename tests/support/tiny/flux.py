"""Tiny weights of the real classes, made in seconds and the same every time, in the layout of `save_pretrained`."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from pipelines.base import Component, Weights
from pipelines.loading import quiet

FluxKind = Literal["dev", "schnell", "kontext"]
FLUX_COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
WORDS = ("a", "on", "the", "red", "green", "blue", "circle", "square", "background", "cat", "photo")
WIDTH = 32
DTYPES = {"BF16": "bfloat16", "F32": "float32"}


def make_all(root: Path) -> dict[str, Path]:
    """Every tiny model in a folder of its own; returns the folders by model name."""
    kinds: tuple[FluxKind, ...] = ("dev", "schnell", "kontext")
    return {f"flux-{kind}": make_flux(root / f"flux-{kind}", kind) for kind in kinds}


def make_flux(folder: Path, kind: FluxKind, single_layers: int = 1) -> Path:
    """About 0.4 MB of bfloat16. The kinds share encoders and VAE byte for byte; the transformer is each one's own."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    pipeline = FluxKontextPipeline if kind == "kontext" else FluxPipeline
    pipe = pipeline(
        transformer=flux_transformer(kind, single_layers),
        text_encoder=clip_encoder(tokenizer),
        text_encoder_2=t5_encoder(tokenizer_2),
        vae=flux_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=flux_noise_scheduler(kind),
    )
    quiet()
    pipe.save_pretrained(folder)
    return folder


def flux_transformer(kind: FluxKind, single_layers: int = 1) -> FluxTransformer2DModel:
    return seeded(
        {"dev": 1, "schnell": 2, "kontext": 3}[kind],
        FluxTransformer2DModel,
        in_channels=64,
        num_layers=1,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=WIDTH // 16,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=kind != "schnell",
    )


def flux_vae() -> AutoencoderKL:
    return seeded(
        4,
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(5, CLIPTextModel, config)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded(6, T5EncoderModel, config)


def seeded(seed: int, kind: Any, *config: Any, **settings: Any) -> Any:
    """The classes' own random weights, from a seed, in bfloat16; the caller's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not the class's own `to`: that of diffusers warns about a cast which is intended here.
        return torch.nn.Module.to(kind(*config, **settings), torch.bfloat16).eval()


def flux_noise_scheduler(kind: FluxKind) -> FlowMatchEulerDiscreteScheduler:
    """The configs that Black Forest Labs publish: dev and Kontext shift by resolution, schnell does not shift."""
    shifted = kind != "schnell"
    return FlowMatchEulerDiscreteScheduler(shift=3.0 if shifted else 1.0, use_dynamic_shifting=shifted)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE as CLIP's: every byte inside and at the end of a word, merges for a few words, two specials."""
    alphabet = byte_alphabet()
    vocab = alphabet + [byte + "</w>" for byte in alphabet]
    merges = [merge for word in WORDS for merge in merges_of(word)]
    vocab += dict.fromkeys(left + right for left, right in merges)
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    pieces = {piece: number for number, piece in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=pieces, merges=list(dict.fromkeys(merges)), model_max_length=77)


def byte_alphabet() -> list[str]:
    """A printable character for each byte, as in GPT-2's `bytes_to_unicode`."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def merges_of(word: str) -> list[tuple[str, str]]:
    """Merges that make one piece of a word, from the left: r+e, re+d</w>."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:n]), letters[n]) for n in range(1, len(letters))]


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram as T5's: padding 0, end 1, unknown 2, then a few words and every printable ASCII character."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    words = [("▁" + word, -2.0) for word in WORDS]
    characters = [(chr(code), -4.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=specials + words + characters, extra_ids=0, model_max_length=512)


def weights_of(folder: Path, names: tuple[str, ...] = FLUX_COMPONENTS) -> Weights:
    """The folder as installed weights: keys by content, bytes and dtypes from the safetensors headers."""
    components = tuple(component_of(folder / name) for name in names)
    return Weights(model=folder.name, family="flux", folder=folder, components=components)


def component_of(path: Path) -> Component:
    file = next(path.glob("*.safetensors"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    weights_bytes, dtype = 0, "BF16"
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, a safe_open is no dict
            weights_bytes += tensors.get_tensor(name).nbytes
            dtype = tensors.get_slice(name).get_dtype()
    return Component(path.name, f"{digest}-{dtype}", weights_bytes, path, DTYPES[dtype])


def model_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text())
