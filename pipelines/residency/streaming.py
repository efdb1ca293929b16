"""A module too large for its device: some blocks stay there, the others pass through two slots as they are run.

While one block is computed with, the next one is copied in. Outputs are the same bits as with all of it resident.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.residency.packed import Block, PackedModule, point
from pipelines.residency.transfer import DeviceTransfer

SLOTS = 2


class Slot:
    """A buffer on the device, which of the streamed blocks is in it, and the event of its arrival."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.arrived: Any = None


class StreamedCopy:
    """Hooks on the blocks bring each one in before it runs, in whatever order; the usual order costs least."""

    def __init__(self, packed: PackedModule, link: DeviceTransfer, kept_bytes: int) -> None:
        self._link, self._host = link, packed.host
        layout = packed.layout
        passes = choose_streamed_blocks([block.size_bytes for block in layout.blocks], kept_bytes)
        kept = [block for block, moves in zip(layout.blocks, passes, strict=True) if not moves]
        self._blocks = [block for block, moves in zip(layout.blocks, passes, strict=True) if moves]
        spans = [
            (0, layout.unblocked_bytes, layout.unblocked),
            *((block.start, block.end, block.slots) for block in kept),
        ]
        buffers = [torch.empty(end - start, dtype=torch.uint8, device=link.device) for start, end, _ in spans]
        largest = max((block.size_bytes for block in self._blocks), default=0)
        self._slots = [Slot(largest, link.device) for _ in range(min(SLOTS, len(self._blocks)))]
        self.size_bytes = sum(buffer.nbytes for buffer in buffers) + sum(slot.buffer.nbytes for slot in self._slots)
        link.wait_for_compute()
        for buffer, (start, end, slots) in zip(buffers, spans, strict=True):
            link.wait(link.copy(buffer, self._host[start:end]))
            point(slots, buffer, start)
        self._hooks = [hook for number, block in enumerate(self._blocks) for hook in self._watch(number, block)]

    def leave(self) -> None:
        self._link.synchronize()
        for hook in self._hooks:
            hook.remove()

    def _watch(self, number: int, block: Block) -> tuple[Any, Any]:
        return (
            block.module.register_forward_pre_hook(lambda module, inputs: self._enter(number), prepend=True),
            block.module.register_forward_hook(lambda module, inputs, output: self._leave(number), always_call=True),
        )

    def _enter(self, number: int) -> None:
        """Before a block runs: its weights are there, and the next block's are on their way."""
        slot = self._slot_of(number) or self._bring(number, self._slots[0])
        self._link.wait(slot.arrived)
        block = self._blocks[number]
        point(block.slots, slot.buffer, block.start)
        following = (number + 1) % len(self._blocks)
        if self._slot_of(following) is None:
            self._bring(following, next(other for other in self._slots if other is not slot))

    def _leave(self, number: int) -> None:
        """After it has run: its slot is another's soon, so nothing may point there."""
        point(self._blocks[number].slots, self._host)

    def _slot_of(self, number: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.holds == number), None)

    def _bring(self, number: int, slot: Slot) -> Slot:
        """Start the copy; it waits for whatever is still computed with the slot's old block."""
        block = self._blocks[number]
        self._link.wait_for_compute()
        slot.arrived = self._link.copy(slot.buffer[: block.size_bytes], self._host[block.start : block.end])
        slot.holds = number
        return slot


def choose_streamed_blocks(sizes: Sequence[int], kept_bytes: int) -> list[bool]:
    """Which blocks pass through, spread evenly among those that stay: each copy then hides behind more work."""
    total_bytes = sum(sizes)
    share = max(0.0, 1 - kept_bytes / total_bytes) if total_bytes else 0.0
    owed, room, found = 0.0, kept_bytes, []
    for size in sizes:
        owed += size * share
        moves = (owed >= size / 2 and share > 0) or size > room
        found.append(moves)
        owed -= size if moves else 0
        room -= 0 if moves else size
    return found
