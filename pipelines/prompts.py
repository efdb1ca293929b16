"""A model's prompts, through its text encoders or from what is kept of them."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipelines.base import Weights
from pipelines.embeddings import Tensors
from pipelines.residency import Residency


class Prompts:
    """Texts of at most `max_tokens` tokens. The names are those of components, and of folders of tokenizers."""

    def __init__(
        self,
        weights: Weights,
        residency: Residency,
        encoders: Sequence[str],
        tokenizers: Sequence[str],
        max_tokens: int,
    ) -> None:
        self.max_tokens = max_tokens
        self._residency = residency
        self._encoders = tuple(weights.component(name).key for name in encoders)
        self._tokenizers = tokenizer_key(*(weights.folder / name for name in tokenizers))

    def embeds(self, text: str, encode: Callable[[], Sequence[torch.Tensor | None]]) -> Tensors:
        """What `encode` makes of the text, on the device. Of a text that was encoded before, without any encoder."""
        key = (*self._encoders, self._tokenizers, text, self.max_tokens)
        return self._residency.embeddings.get(key, self._residency.device, encode)


def tokenizer_key(*folders: Path) -> str:
    """The hash of tokenizers' files."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
