"""Which devices there are: budgets, a container's limit, what a worker's process is told."""

from pathlib import Path

import pytest

from server.workers import devices
from server.workers.devices import DeviceSpec, environment, host_bytes, inventory


@pytest.mark.parametrize("limit", ["1073741824\n", "max\n", "9223372036854771712\n"])
def test_host_memory_is_the_containers_limit_where_that_is_lower(tmp_path: Path, limit: str):
    (tmp_path / "memory.max").write_text(limit)
    physical_bytes = host_bytes([])
    expected = min(physical_bytes, int(limit)) if limit != "max\n" else physical_bytes
    assert host_bytes([tmp_path / "memory.max", tmp_path / "not there"]) == expected


def test_host_memory_for_copies_is_shared_by_the_gpus(monkeypatch: pytest.MonkeyPatch):
    gpus = [DeviceSpec(f"GPU-{n}", "GPU", "cuda", 24 * 2**30, 22 * 2**30) for n in range(2)]
    monkeypatch.setattr(devices, "_gpus", lambda: iter(gpus))
    monkeypatch.setattr(devices, "host_bytes", lambda: 100 * 2**30)
    found = inventory(limit_bytes=20 * 2**30)
    assert [each.host_budget_bytes for each in found] == [int(32.5 * 2**30)] * 2
    assert [each.budget_bytes for each in found] == [20 * 2**30] * 2
    assert environment(found[0])["PLANTAIN_WORKER_HOST_BYTES"] == str(int(32.5 * 2**30))


def test_on_a_cpu_the_host_is_the_device():
    cpu = DeviceSpec("cpu", "CPU", "cpu", 8 * 2**30, 6 * 2**30)
    assert cpu.host_budget_bytes is None
    assert environment(cpu)["PLANTAIN_WORKER_HOST_BYTES"] == "0"
