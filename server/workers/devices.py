"""Which devices there are, and how many bytes of each may be given out."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pynvml

from pipelines.python_process import import_environment

CUDA_CONTEXT_BYTES = 600 * 2**20
"""What a process's CUDA context takes on the device before the first tensor."""

HOST_SHARE = 0.65
"""Of the host's memory, what all workers' copies of weights may take: page-locked, they never make room for others."""

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container's limit is, with control groups of version 2 and 1."""


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU, known by UUID, or the CPU. The budget is what is left of `total_bytes` after the reserve.

    `host_budget_bytes` is what its worker's copies of weights in host memory may take; None: the host is the device.
    `margin_bytes` of the reserve is for others: as much as the driver calls free is left free.
    """

    id: str
    name: str
    torch_device: str
    total_bytes: int
    budget_bytes: int
    host_budget_bytes: int | None = None
    margin_bytes: int = 0


def inventory(limit_bytes: int | None = None) -> list[DeviceSpec]:
    """The GPUs, or, where there is none, the CPU. `limit_bytes` caps every budget."""
    gpus = list(_gpus())
    share_bytes = int(host_bytes() * HOST_SHARE) // max(1, len(gpus))
    devices = [replace(gpu, host_budget_bytes=share_bytes) for gpu in gpus] or [_cpu()]
    if limit_bytes is None:
        return devices
    return [replace(each, budget_bytes=min(limit_bytes, each.budget_bytes)) for each in devices]


def free_bytes(devices: Iterable[DeviceSpec]) -> dict[str, int]:
    """What the driver calls free now, by GPU, whoever has the rest. One that cannot be asked is left out."""
    found = {}
    for device in devices:
        with suppress(pynvml.NVMLError):
            _open_driver()
            handle = pynvml.nvmlDeviceGetHandleByUUID(device.id)
            found[device.id] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    return found


@cache
def _open_driver() -> None:
    """Once: it can take seconds."""
    pynvml.nvmlInit()


def environment(device: DeviceSpec) -> dict[str, str]:
    """What a worker's process sees: its own GPU only. Segments that grow keep fragmentation from ending in OOM."""
    visible = device.id if device.torch_device.startswith("cuda") else ""
    return {
        **import_environment(),
        "CUDA_VISIBLE_DEVICES": visible,
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PLANTAIN_WORKER_HOST_BYTES": str(device.host_budget_bytes or 0),
    }


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
            margin_bytes = max(512 * 2**20, total_bytes * 3 // 100)
            reserve_bytes = CUDA_CONTEXT_BYTES + margin_bytes
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            yield DeviceSpec(uuid, name, "cuda", total_bytes, total_bytes - reserve_bytes, margin_bytes=margin_bytes)
    finally:
        pynvml.nvmlShutdown()


def _cpu() -> DeviceSpec:
    """Reserve: a quarter of the memory, at least 2 GiB, for the system, the server and its file cache."""
    total_bytes = host_bytes()
    reserve_bytes = max(2 * 2**30, total_bytes // 4)
    return DeviceSpec("cpu", "CPU", "cpu", total_bytes, max(0, total_bytes - reserve_bytes))


def host_bytes(limits: Iterable[Path] = CGROUP_LIMITS) -> int:
    """Host memory, or the container's limit where that is lower."""
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [path.read_text().strip() for path in limits if path.exists()]
    return min([physical_bytes, *(int(limit) for limit in found if limit != "max")])
