"""What a busy device brings for the job that should start there next, while its own job runs. Pure."""

from collections.abc import Iterator

from server.scheduling.need import Need
from server.scheduling.placement import choose_mode
from server.scheduling.types import DeviceState, Prefetch


def plan_prefetch(job_id: str, need: Need, device: DeviceState, min_prefetch_bytes: float) -> Prefetch | None:
    """What a device that runs a job brings for another one; None where nothing would be gained.

    1. Components under `worth_bytes` are left: to load them takes no time to speak of.
    2. Into host memory come those whose copies fit beside the copies that the running job needs, and the device's.
    3. Onto the device come, of these, those for which bytes are free beside all that the running job may take, if both
       jobs are run with all their weights resident. Nothing is evicted for it: another job might come first.
    """
    wanted = [
        key
        for key in keys_in_phase_order(need)
        if need.sizes[key] >= min_prefetch_bytes and key not in dict(device.resident)
    ]
    hosted = list(fitting_in_host(wanted, need, device))
    to_device = list(fitting_on_device(hosted, need, device))
    copies = {key for key, _ in device.host_copies} if device.host_budget_bytes is not None else {*hosted}
    to_host = [key for key in hosted if key not in copies and key not in to_device]
    return Prefetch(device.id, job_id, tuple(to_device), tuple(to_host)) if to_device or to_host else None


def keys_in_phase_order(need: Need) -> list[str]:
    """Keys of the need, those of its first phase first."""
    return list(dict.fromkeys([*(key for phase in need.phases for key in phase.keys if key in need.keys), *need.sizes]))


def fitting_in_host(wanted: list[str], need: Need, device: DeviceState) -> Iterator[str]:
    """Those that the host has a copy of, or has room for one, whatever the running job loads."""
    if device.host_budget_bytes is None or device.running_need is None:
        yield from wanted if device.running_need else ()
        return
    kept = {**dict(device.host_copies), **device.running_need.sizes}
    in_use = {key for key, _ in device.resident} | device.running_need.keys
    room = device.host_budget_bytes - sum(size for key, size in kept.items() if key in in_use)
    for key in wanted:
        size = kept.get(key, need.sizes[key])
        if key in in_use or size <= room:
            room -= 0 if key in in_use else size
            yield key


def fitting_on_device(hosted: list[str], need: Need, device: DeviceState) -> Iterator[str]:
    """Those that fit on the device now, and for as long as its job runs."""
    way, running = choose_mode(need, device), choose_mode(device.running_need, device) if device.running_need else None
    if (
        device.running_need is None
        or way is None
        or running is None
        or (way.tier, running.tier) != ("resident", "resident")
    ):
        return
    resident = dict(device.resident)
    there_bytes = sum(min(resident.get(key, 0), size) for key, size in device.running_need.components)
    room = device.free_bytes - (device.running_need.bytes_in(running) - there_bytes)
    for key in hosted:
        if need.sizes[key] <= room:
            room -= need.sizes[key]
            yield key
