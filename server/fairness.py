"""Who has had how much: device-seconds by user, over the weight of their plan. Pure.

Fair queueing by virtual time, as in Linux's CFS: whoever has spent least goes first, and whoever comes back after a
pause starts level with the others, neither ahead for having been away nor behind for what nobody else wanted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Shares:
    """`spent_s` are device-seconds over weight. `turn_at` is when a user's oldest job last started.

    `floor_s` is what the least served of those with work had spent: it only rises.
    """

    floor_s: float = 0.0
    spent_s: Mapping[str, float] = field(default_factory=dict)
    turn_at: Mapping[str, float] = field(default_factory=dict)

    def spent(self, user_id: str) -> float:
        return self.spent_s.get(user_id, self.floor_s)


def joined(shares: Shares, user_id: str) -> Shares:
    """The user has work again, having had none."""
    level_s = max(shares.spent(user_id), shares.floor_s)
    return replace(shares, spent_s={**shares.spent_s, user_id: level_s})


def charged(shares: Shares, user_id: str, device_s: float, weight: float, active: Iterable[str]) -> Shares:
    """The user has had so many device-seconds more, or fewer where a guess is put right. `active` are all with jobs."""
    spent_s = {**shares.spent_s, user_id: shares.spent(user_id) + device_s / weight}
    least_s = min((spent_s.get(each, shares.floor_s) for each in active), default=shares.floor_s)
    return replace(shares, spent_s=spent_s, floor_s=max(shares.floor_s, least_s))


def turned(shares: Shares, user_id: str, now: float) -> Shares:
    """The user's oldest job has started."""
    return replace(shares, turn_at={**shares.turn_at, user_id: now})


def jain(amounts: Iterable[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all."""
    values = list(amounts)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def max_min(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """The fair division: nobody gets more than they ask for, and what some leave is divided among the others."""
    given, left_s = {}, capacity
    for index, (user_id, demand) in enumerate(sorted(demands.items(), key=lambda each: each[1])):
        given[user_id] = min(demand, left_s / (len(demands) - index))
        left_s -= given[user_id]
    return given
