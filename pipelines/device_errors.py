"""Classifies exceptions of a pipeline: out of memory, or device lost."""

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""In the message of the plain RuntimeError that torch raises on a CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Device or host memory was exhausted. The run may succeed in another execution mode or on another device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def is_device_lost(error: BaseException) -> bool:
    """A CUDA error other than out of memory. The CUDA context may be corrupt, so the process should exit."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
