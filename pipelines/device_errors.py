"""What an exception out of a pipeline says about its device."""

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""On a CPU torch raises a plain RuntimeError that says so."""


def is_out_of_memory(error: BaseException) -> bool:
    """The device's memory, or the host's, was not enough: the run may do in another way or place."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def is_device_lost(error: BaseException) -> bool:
    """A CUDA error other than out of memory: the process's context is not to be trusted any more."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
