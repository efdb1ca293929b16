"""Streams a module that is too large for its device: some blocks stay there, the others are copied in as they run.

While one block computes, the next one is copied. Outputs are bit for bit those of a resident module.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.base import STREAMING_SLOTS
from pipelines.residency.packed import Block, PackedModule, point
from pipelines.residency.transfer import DeviceTransfer


class StreamedCopy:
    """The device's copy of a streamed module. Hooks copy each block in before it runs.

    Blocks may run in any order; their order in the module is the fastest, since the next block is copied ahead.
    """

    def __init__(self, packed: PackedModule, transfer: DeviceTransfer, kept_bytes: int) -> None:
        """`kept_bytes` is how many bytes of blocks may stay on the device."""
        self._transfer, self._host = transfer, packed.host
        layout = packed.layout
        streamed = choose_streamed_blocks([block.size_bytes for block in layout.blocks], kept_bytes)
        kept = [block for block, moves in zip(layout.blocks, streamed, strict=True) if not moves]
        self._blocks = [block for block, moves in zip(layout.blocks, streamed, strict=True) if moves]
        spans = [
            (0, layout.unblocked_bytes, layout.unblocked),
            *((block.start, block.end, block.slots) for block in kept),
        ]
        buffers = [torch.empty(end - start, dtype=torch.uint8, device=transfer.device) for start, end, _ in spans]
        largest = max((block.size_bytes for block in self._blocks), default=0)
        count = min(STREAMING_SLOTS, len(self._blocks))
        self._buffers = [BlockBuffer(largest, transfer.device) for _ in range(count)]
        self.size_bytes = sum(each.nbytes for each in [*buffers, *(each.buffer for each in self._buffers)])
        transfer.wait_for_compute()
        for buffer, (start, end, slots) in zip(buffers, spans, strict=True):
            transfer.wait(transfer.copy(buffer, self._host[start:end]))
            point(slots, buffer, start)
        self._hooks = [hook for number, block in enumerate(self._blocks) for hook in self._add_hooks(number, block)]

    def release(self) -> None:
        """Removes the hooks, so that the buffers can be freed once all copies have ended."""
        self._transfer.synchronize()
        for hook in self._hooks:
            hook.remove()

    def _add_hooks(self, number: int, block: Block) -> tuple[Any, Any]:
        return (
            block.module.register_forward_pre_hook(lambda module, inputs: self._enter(number), prepend=True),
            block.module.register_forward_hook(lambda module, inputs, output: self._leave(number), always_call=True),
        )

    def _enter(self, number: int) -> None:
        """Before a block runs: waits for its weights, and starts to copy those of the next block."""
        current = self._buffer_of(number) or self._start_copy(number, self._buffers[0])
        self._transfer.wait(current.arrived)
        block = self._blocks[number]
        point(block.slots, current.buffer, block.start)
        following = (number + 1) % len(self._blocks)
        if self._buffer_of(following) is None:
            self._start_copy(following, next(other for other in self._buffers if other is not current))

    def _leave(self, number: int) -> None:
        """After a block ran: its tensors point to the host again, since the buffer is used for another block next."""
        point(self._blocks[number].slots, self._host)

    def _buffer_of(self, number: int) -> "BlockBuffer | None":
        return next((each for each in self._buffers if each.block == number), None)

    def _start_copy(self, number: int, to: "BlockBuffer") -> "BlockBuffer":
        """Starts a copy, which first waits for the computation that still uses the buffer's previous block."""
        block = self._blocks[number]
        self._transfer.wait_for_compute()
        arrived = self._transfer.copy(to.buffer[: block.size_bytes], self._host[block.start : block.end])
        to.fill(number, arrived)
        return to


class BlockBuffer:
    """A buffer on the device, the number of the streamed block that is in it, and the event of that block's arrival."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.arrived: Any = None

    def fill(self, block: int, arrived: Any) -> None:
        self.block, self.arrived = block, arrived


def choose_streamed_blocks(sizes: Sequence[int], kept_bytes: int) -> list[bool]:
    """Which blocks are streamed, evenly spread among those that stay: then more computation hides each copy."""
    total_bytes = sum(sizes)
    share = max(0.0, 1 - kept_bytes / total_bytes) if total_bytes else 0.0
    owed, room, streamed = 0.0, kept_bytes, []
    for size in sizes:
        owed += size * share
        moves = (owed >= size / 2 and share > 0) or size > room
        streamed.append(moves)
        owed -= size if moves else 0
        room -= 0 if moves else size
    return streamed
