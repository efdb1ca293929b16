"""What is tried next with a job that ran out of memory. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.base import TIERS, Way
from server.placement import Device, choose
from server.vram import Need

DESCENT = tuple(Way(tier, tiled) for tier in TIERS for tiled in (False, True))
"""From the most bytes to the fewest: tiled decoding comes before the next tier."""


@dataclass(frozen=True)
class Rung:
    """One try, which ran out of memory or is to come."""

    device: str
    way: Way


def next_rung(tried: Sequence[Rung], need: Need, devices: Sequence[Device]) -> Rung | None:
    """The try after those in `tried`, of which the last has just failed; `need` is the job's own, as at its submit.

    1. The same way once more: all else on the device was freed meanwhile, and another program may have been too.
    2. Then, on the same device, tiled decoding; 3. staged; 4. streamed; as far as the model can be run so.
    5. Then another device that could hold the job, in the way it would choose, and down from there again.
    6. None: it cannot be run here. It runs at fal, where that is allowed; else it is failed and refunded.
    """
    here = [rung.way for rung in tried if rung.device == tried[-1].device]
    if len(here) == 1:
        return tried[-1]
    for way in DESCENT[DESCENT.index(here[-1]) + 1 :]:
        rung = Rung(tried[-1].device, way)
        if way in need.possible and any(choose(bound(need, rung), device) for device in devices):
            return rung
    seen = {rung.device for rung in tried}
    for device in devices:
        best_way = choose(need, device)
        if best_way and device.id not in seen:
            return Rung(device.id, best_way)
    return None


def bound(need: Need, rung: Rung) -> Need:
    """The need of a job that is to be tried on this rung and nowhere else."""
    return replace(need, ways=(rung.way,), devices=frozenset({rung.device}))
