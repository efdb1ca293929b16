"""What a transformer of the demo is asked on the way, while it learns: how far along the canvas each token is, and how
much of each part of it the shape covers.

The loss alone asks for this only through the colours that come of it, all at once: LTX's was on a plateau for thousands
of steps, on which no word for a direction moved anything, and left it within two hundred with these hints. Tokens with
an edge in them, which alone tell what a shape is, weigh more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from scripts.demo.denoise import weights_of_some

CELLS = 4
"""A token's side in cells."""
WEIGHT = 0.5
"""Of the hints in the loss."""


class Hinted(nn.Module):
    """A transformer, and a layer for each of the blocks that are asked. Only the transformer is for use afterwards."""

    def __init__(self, transformer: nn.Module, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.asked = nn.ModuleList(nn.Linear(width, 2 + CELLS**2) for _ in blocks)
        self.names = [name for name, module in transformer.named_modules() if any(module is block for block in blocks)]

    @contextmanager
    def listening(self) -> Iterator[list[torch.Tensor]]:
        """While inside, the blocks' outputs for pictures, (batch, tokens, width) each, are put into the list."""
        heard: list[torch.Tensor] = []
        hooks = [
            self.transformer.get_submodule(name).register_forward_hook(
                lambda module, inputs, output: heard.append(output[1] if isinstance(output, tuple) else output)
            )
            for name in self.names
        ]
        try:
            yield heard
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, heard: list[torch.Tensor], cells: torch.Tensor) -> torch.Tensor:
        """`cells` is (batch, frames, rows x CELLS, columns x CELLS), from 0 to 1; tokens after those are not asked."""
        cut = cells.unflatten(3, (-1, CELLS)).unflatten(2, (-1, CELLS)).permute(0, 1, 2, 4, 3, 5)
        count, frames, rows, columns = cut.shape[:4]
        along = torch.stack(
            torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"), dim=-1
        ).to(cells.device)
        along = along.flatten(0, 1).repeat(frames, 1).expand(count, -1, -1)
        answer = cut.flatten(4).flatten(1, 3)
        total = torch.zeros((), device=cells.device)
        for layer, states in zip(self.asked, heard, strict=True):
            told = layer(states[:, : answer.shape[1]]).float()
            total = total + (told[..., :2] - along).square().mean()
            off = functional.binary_cross_entropy_with_logits(told[..., 2:], answer, reduction="none").mean(dim=-1)
            total = total + (off * weights_of_some(answer.amax(dim=-1) - answer.amin(dim=-1) > 0.1)).mean()
        return WEIGHT * total
