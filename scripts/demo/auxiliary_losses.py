"""What a transformer of the demo is asked on the way, while it learns: how far along the canvas each token is, and how
much of each part of it the shape covers.

The loss alone asks for this only through the colours that come of it, all at once: LTX's was on a plateau for thousands
of steps, on which no word for a direction moved anything, and left it within two hundred with these hints. Tokens with
an edge in them, which alone tell what a shape is, weigh more.

Where an instruction and a picture tell together what is to be drawn, the words' states are asked for its name: they are
where a description would have it, so that what draws from descriptions draws from them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from scripts.demo.losses import weights_of_some
from scripts.demo.scenes import ATTRIBUTES, Scene

CELLS = 4
"""A token's side in cells."""
WEIGHT = 0.5
"""Of the hints in the loss."""
NAMED = ("shape", "colour", "size", "place", "background")
"""The attributes that the words' states are asked for."""
NO_NAME = -1
NAME_WEIGHT = 0.25
"""Of those in the loss: while nothing is known of them, they come to about two and a half."""


class Hinted(nn.Module):
    """A transformer, and a layer for each of the blocks that are asked. Only the transformer is for use afterwards.

    `naming` is a block of Flux's, if one is to be asked for names.
    """

    def __init__(
        self, transformer: nn.Module, blocks: Sequence[nn.Module], width: int, naming: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.asked = nn.ModuleList(nn.Linear(width, 2 + CELLS**2) for _ in blocks)
        self.names = [name for name, module in transformer.named_modules() if any(module is block for block in blocks)]
        if naming is not None:
            self.asked_names = nn.Linear(width, sum(len(ATTRIBUTES[name]) for name in NAMED))
            self.naming = next(name for name, module in transformer.named_modules() if module is naming)

    def listening(self) -> AbstractContextManager[list[torch.Tensor]]:
        """While inside, the blocks' outputs for pictures, (batch, tokens, width) each, are put into the list."""
        return self.outputs(self.names, lambda output: output[1] if isinstance(output, tuple) else output)

    def listening_to_words(self) -> AbstractContextManager[list[torch.Tensor]]:
        """While inside, the naming block's output for the prompt, (batch, tokens, width), is put into the list."""
        return self.outputs([self.naming], lambda output: output[0])

    @contextmanager
    def outputs(self, names: list[str], of: Callable[[Any], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        heard: list[torch.Tensor] = []
        hooks = [
            self.transformer.get_submodule(name).register_forward_hook(
                lambda module, inputs, output: heard.append(of(output))
            )
            for name in names
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

    def naming_loss(self, heard: list[torch.Tensor], scenes: Sequence[Scene], said: torch.Tensor) -> torch.Tensor:
        """How far the words are from naming what is drawn; only of those scenes, (batch,), of which something is said.

        A description that leaves something out means what is usual: medium, in the center, on white. Nobody is asked
        for the name of what has none.
        """
        (states,) = heard
        logits = self.asked_names(states.mean(dim=1)).float()
        total = torch.zeros((), device=logits.device)
        for name, told in zip(NAMED, logits.split([len(ATTRIBUTES[name]) for name in NAMED], dim=1), strict=True):
            values = [getattr(each, name) for each in scenes]
            answer = [ATTRIBUTES[name].index(each) if each in ATTRIBUTES[name] else NO_NAME for each in values]
            asked = torch.tensor(answer, device=told.device)
            off = functional.cross_entropy(told, asked, reduction="none", ignore_index=NO_NAME)
            total = total + (off * said).mean()
        return NAME_WEIGHT * total
