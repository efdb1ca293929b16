"""Tiny Wan and LTX weights of the real classes, made in seconds and the same every time."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from pipelines.base import Component, Weights
from pipelines.loading import quiet
from tests.support.tiny.flux import WIDTH, component_of, seeded, t5_encoder, t5_tokenizer

WanKind = Literal["t2v", "i2v", "flf2v", "vace"]
PIPELINES = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline, "flf2v": WanImageToVideoPipeline,
             "vace": WanVACEPipeline}  # fmt: skip
LATENTS = 16


def make_all_video(root: Path) -> dict[str, Path]:
    """Every tiny video model in a folder of its own; returns the folders by name."""
    kinds: tuple[WanKind, ...] = ("t2v", "i2v", "flf2v", "vace")
    return {f"wan-{kind}": make_wan(root / f"wan-{kind}", kind) for kind in kinds} | {"ltx": make_ltx(root / "ltx")}


def make_wan(folder: Path, kind: WanKind) -> Path:
    """About 1 MB. The kinds share text encoder and VAE byte for byte; the transformer is each one's own."""
    tokenizer = t5_tokenizer()
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": umt5_encoder(tokenizer),
        "vae": wan_vae(),
        "transformer": wan_transformer(kind),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    }
    if kind in ("i2v", "flf2v"):
        parts |= {"image_encoder": clip_vision(), "image_processor": clip_processor()}
    quiet()
    PIPELINES[kind](**parts).save_pretrained(folder)
    return folder


def wan_transformer(kind: WanKind) -> WanTransformer3DModel:
    sizes: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": WIDTH,
        "num_layers": 2,
    }
    if kind == "vace":
        return seeded(23, WanVACETransformer3DModel, **sizes, vace_layers=[0], vace_in_channels=96)
    if kind in ("i2v", "flf2v"):
        # beside the latents: their condition, and a mask of four frames to a latent one
        sizes |= {"in_channels": 2 * LATENTS + 4, "image_dim": WIDTH, "added_kv_proj_dim": 24}
        sizes |= {"pos_embed_seq_len": 2 * VISION_TOKENS} if kind == "flf2v" else {}
    return seeded({"t2v": 21, "i2v": 22, "flf2v": 24}[kind], WanTransformer3DModel, **sizes)


def wan_vae() -> AutoencoderKLWan:
    vae = seeded(25, AutoencoderKLWan, base_dim=4, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return torch.nn.Module.to(vae, torch.float32)


def umt5_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded(26, UMT5EncoderModel, config)


VISION_SIDE, VISION_PATCH = 32, 16
VISION_TOKENS = (VISION_SIDE // VISION_PATCH) ** 2 + 1


def clip_vision() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=VISION_SIDE,
        patch_size=VISION_PATCH,
        projection_dim=WIDTH,
    )
    return torch.nn.Module.to(seeded(27, CLIPVisionModel, config), torch.float32)


def clip_processor() -> CLIPImageProcessor:
    side = {"height": VISION_SIDE, "width": VISION_SIDE}
    return CLIPImageProcessor(size={"shortest_edge": VISION_SIDE}, crop_size=side)


def make_ltx(folder: Path) -> Path:
    """About 1 MB: 32 x 32 pixels and 8 frames to a latent, as the real one, with a decoder that takes a timestep."""
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 128
    pipe = LTXConditionPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=ltx_vae(),
        transformer=ltx_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    quiet()
    pipe.save_pretrained(folder)
    return folder


def ltx_transformer() -> LTXVideoTransformer3DModel:
    return seeded(
        31,
        LTXVideoTransformer3DModel,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=WIDTH,
        num_layers=1,
        caption_channels=WIDTH,
    )


def ltx_vae() -> AutoencoderKLLTXVideo:
    return seeded(
        32,
        AutoencoderKLLTXVideo,
        latent_channels=LATENTS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        decoder_inject_noise=(False,) * 5,
        timestep_conditioning=True,
    )


WAN_DTYPES = {"vae": "float32", "image_encoder": "float32"}


def video_weights_of(folder: Path) -> Weights:
    """The folder as installed weights, with all of its components."""
    parts: list[Component] = [component_of(file.parent) for file in sorted(folder.glob("*/*.safetensors"))]
    return Weights(folder.name, folder.name.partition("-")[0], folder, tuple(parts))
