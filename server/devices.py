"""Which devices there are, and how many bytes of each may be given out."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pynvml

CUDA_CONTEXT_BYTES = 600 * 2**20
"""What a process's CUDA context takes on the device before the first tensor."""


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU, known by UUID, or the CPU. The budget is what is left of `total_bytes` after the reserve."""

    id: str
    name: str
    torch_device: str
    total_bytes: int
    budget_bytes: int


def inventory(limit_bytes: int | None = None) -> list[DeviceSpec]:
    """The GPUs, or, where there is none, the CPU. `limit_bytes` caps every budget."""
    devices = list(_gpus()) or [_cpu()]
    if limit_bytes is None:
        return devices
    return [
        DeviceSpec(each.id, each.name, each.torch_device, each.total_bytes, min(limit_bytes, each.budget_bytes))
        for each in devices
    ]


def environment(device: DeviceSpec) -> dict[str, str]:
    """What a worker's process sees: its own GPU only. Segments that grow keep fragmentation from ending in OOM."""
    visible = device.id if device.torch_device.startswith("cuda") else ""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _gpus() -> Iterator[DeviceSpec]:
    """Reserve: the context, and 512 MiB or 3 % for what the driver and others take, whichever is more."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            total_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            reserve_bytes = CUDA_CONTEXT_BYTES + max(512 * 2**20, total_bytes * 3 // 100)
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            yield DeviceSpec(uuid, name, "cuda", total_bytes, total_bytes - reserve_bytes)
    finally:
        pynvml.nvmlShutdown()


def _cpu() -> DeviceSpec:
    """Reserve: a quarter of the memory, at least 2 GiB, for the system, the server and its file cache."""
    total_bytes = host_bytes()
    reserve_bytes = max(2 * 2**30, total_bytes // 4)
    return DeviceSpec("cpu", "CPU", "cpu", total_bytes, max(0, total_bytes - reserve_bytes))


def host_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Host memory, or the container's limit where that is lower."""
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.read_text().strip() if cgroup.exists() else "max"
    return physical_bytes if limit == "max" else min(physical_bytes, int(limit))
