"""The demo's tokenizers and text encoders: tiny, of the real classes, trained to know what a prompt names."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from scripts.demo.prompts import STRANGE, Said, describe, instruct, strange, vocabulary
from scripts.demo.scenes import ATTRIBUTES, DIRECTIONS, edited, random_scene
from scripts.demo.training import device, learn

TOKENS = 32
"""Of a prompt; more are cut off."""
WIDTH = 64
STEPS, VIDEO_STEPS = 2_000, 5_000
"""Flux has CLIP to help; the video models read these states alone."""
BATCH = 64
CLASSES = [len(values) + 1 for values in ATTRIBUTES.values()]
"""Of each attribute: its values, and that the prompt does not name it."""


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram as T5's: padding 0, end 1, unknown 2, then the words in the three ways that they are written."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0)]
    words = dict.fromkeys(way for word in vocabulary() for way in (word, word.capitalize(), word.upper()))
    signs = [(sign, -4.0) for sign in ",.;:!?-"]
    return T5TokenizerFast(
        vocab=specials + [("▁" + word, -3.0) for word in words] + signs, extra_ids=0, model_max_length=TOKENS
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE as CLIP's, with merges for the words of the world."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocab = alphabet + [byte + "</w>" for byte in alphabet]
    merges = list(dict.fromkeys(merge for word in vocabulary() for merge in merges_of(word)))
    vocab += [left + right for left, right in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    pieces = {piece: number for number, piece in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=pieces, merges=merges, model_max_length=TOKENS)


def merges_of(word: str) -> list[tuple[str, str]]:
    """From the left: r+e, re+d</w>."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:n]), letters[n]) for n in range(1, len(letters))]


def tokens_of(tokenizer: Any, texts: list[str]) -> Any:
    """As the pipelines ask for them: (count, TOKENS), padded, with the mask."""
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").to(device())


def train_clip(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    torch.manual_seed(11)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    return tokenizer, train(
        "clip", folder, tokenizer, model, lambda encoder, tokens: encoder(tokens.input_ids).pooler_output[:, None]
    )


def t5_sizes(tokenizer: T5TokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def train_t5(folder: Path, steps: int = STEPS) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """Sees its padding half of the time: Flux has no mask for it, LTX has."""
    torch.manual_seed(12)
    tokenizer = t5_tokenizer()
    model = T5EncoderModel(T5Config(**t5_sizes(tokenizer)))

    def tokenwise(encoder: nn.Module, tokens: Any) -> torch.Tensor:
        mask = tokens.attention_mask if torch.rand(()) < 0.5 else torch.ones_like(tokens.attention_mask)
        return encoder(tokens.input_ids, mask)[0]

    return tokenizer, train("t5", folder, tokenizer, model, tokenwise, steps)


def train_umt5(folder: Path, steps: int = STEPS) -> tuple[T5TokenizerFast, UMT5EncoderModel]:
    """Never sees its padding, as in Wan."""
    torch.manual_seed(13)
    tokenizer = t5_tokenizer()
    model = UMT5EncoderModel(UMT5Config(**t5_sizes(tokenizer)))

    def tokenwise(encoder: nn.Module, tokens: Any) -> torch.Tensor:
        return encoder(tokens.input_ids, tokens.attention_mask)[0]

    return tokenizer, train("umt5", folder, tokenizer, model, tokenwise, steps)


def train(
    name: str,
    folder: Path,
    tokenizer: Any,
    encoder: nn.Module,
    states: Callable[[nn.Module, Any], torch.Tensor],
    steps: int = STEPS,
) -> Any:
    """Each state of the encoder, (count, tokens, width), must tell all that the prompt names."""
    both = nn.ModuleDict({"encoder": encoder, "heads": nn.Linear(WIDTH, sum(CLASSES))}).to(device())

    def loss_of(step: int) -> torch.Tensor:
        random = Random(step)
        texts, said = zip(*(prompt(random) for _ in range(BATCH)), strict=True)
        told = both["heads"](states(both["encoder"], tokens_of(tokenizer, list(texts)))).float()
        answers = torch.tensor([numbers(each) for each in said], device=device())
        total = torch.zeros((), device=device())
        for part, answer in zip(told.split(CLASSES, dim=-1), answers.T, strict=True):
            every = answer[:, None].expand(part.shape[:2])
            total = total + functional.cross_entropy(part.flatten(0, 1), every.flatten())
        return total / len(CLASSES)

    return learn(name, both, loss_of, steps, 3e-3, folder)["encoder"]


def prompt(random: Random) -> tuple[str, Said]:
    chance = random.random()
    scene = random_scene(random)
    if chance < 0.1:
        return strange(random), {}
    if chance < 0.3:
        name, after = edited(scene, random)
        value = getattr(after, name)
        return instruct(scene, name, value, random), {name: value}
    if chance < 0.6:
        scene = replace(scene, direction=random.choice(list(DIRECTIONS)))
    text, said = describe(scene, random)
    if random.random() < 0.1:
        text = f"{text} {' '.join(random.choices(STRANGE, k=random.randint(1, 4)))}"
    return text, said


def numbers(said: Said) -> list[int]:
    """Of each attribute: 0 where the prompt does not name it, else the value's number, counted from 1."""
    return [1 + values.index(said[name]) if name in said else 0 for name, values in ATTRIBUTES.items()]
