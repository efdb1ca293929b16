"""Which job runs where, and when. Pure: no clock, no I/O, no log. What it promises is in `docs/scheduling.md`."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

from server.scheduling.fairness import Shares
from server.scheduling.placement import evictions, ranked_devices, refusal
from server.scheduling.prefetch import plan_prefetch
from server.scheduling.types import Action, DeviceState, Prefetch, Refuse, Start, WaitingJob


@dataclass(frozen=True)
class Policy:
    """Figures of the plan, found by simulation (`docs/scheduling.md`).

    To the device-seconds that its user has had, a job adds `length_bias` times its own length, so that short ones go
    first, and `quantum` times what its weights take to load, so that a device stays with those that it has; less
    `wear` times what it has waited, so that it does not stay for ever. Jobs longer than `long_s` take no more than half
    of the devices while others wait. Nobody's oldest job is passed over for longer than `age_cap_s`. Components under
    `worth_bytes` are not prefetched.
    """

    switch_penalty: float = 200.0
    switch_penalty_decay: float = 5.0
    length_bias: float = 20.0
    long_job_s: float = 30.0
    max_wait_s: float = 600.0
    min_prefetch_bytes: float = 64 * 2**20


def plan(
    waiting: Sequence[WaitingJob],
    devices: Sequence[DeviceState],
    now: float = 0.0,
    shares: Shares = Shares(),
    policy: Policy = Policy(),
) -> list[Action]:
    """What to do now, in order.

    1. A job that no device could hold, even empty, is refused with the numbers. One that could be held, were it not
       for other programs, waits.
    2. While a device is idle that can hold a waiting job, one starts. First those that an admin has put in front.
    3. Then whoever's oldest job is overdue, passed over for longer than the age cap; the longest overdue first.
    4. Then the job with the least sum of what its user has had, its own length, and what its weights cost to load.
    5. But long ones take half of the devices at most, while anything else can start.
    6. Last those that an admin has put back.
    7. A job takes, of the idle devices that can hold it, the one where it ends soonest; of those, the one with the most
       room; of those, the first. What is in its way there is evicted, the least recently used first.
    8. A busy device prepares for the job that would be next there by these rules when it comes free, one at a time.
    """
    if not waiting or not any(
        device.idle or (device.running_need and not device.prefetching_for) for device in devices
    ):
        return []
    queue = Candidates(waiting, devices, now, shares, policy)
    actions: list[Action] = list(queue.refusals())  # 1
    while found := queue.first():
        job, device = found
        actions += [*evictions(job.need, device), Start(job.job_id, device.id)]
        queue.take(job, device)
    if policy.min_prefetch_bytes < math.inf:
        actions += queue.prepared()  # 8
    return actions


class Candidates:
    """The waiting jobs by line, while one plan is made: only the head of each line is ever looked at."""

    def __init__(
        self, waiting: Sequence[WaitingJob], devices: Sequence[DeviceState], now: float, shares: Shares, policy: Policy
    ) -> None:
        self.waiting, self.devices, self.shares, self.policy = waiting, devices, shares, policy
        self.now = now
        self.lines = [job.line for job in waiting]
        heads = list(first_of_each(waiting, self.lines).values())
        self.heads: defaultdict[str, dict[str, WaitingJob]] = defaultdict(dict)
        for job in heads:
            self.heads[job.kind][job.line] = job
        self.oldest = first_of_each(heads, [job.user_id for job in heads])
        self.virtual_time_s = {user_id: shares.spent(user_id) for user_id in self.oldest}
        self.has_priorities = any(job.priority for job in heads)
        self.least: dict[str, WaitingJob | None] = {}
        self.idle = [device for device in devices if device.idle]
        self.options = {
            kind: ranked_devices(next(iter(line.values())).need, self.idle) for kind, line in self.heads.items()
        }
        long = [device for device in devices if not device.idle and device.running_expected_s > policy.long_job_s]
        self.open_to_long = max(1, len(devices) // 2) - len(long)

    def refusals(self) -> Iterator[Refuse]:
        """Refuse the jobs that nothing could hold."""
        if not self.idle:
            return
        largest_bytes = max(device.without_other_processes.budget_bytes for device in self.devices)
        nowhere = [kind for kind, found in self.options.items() if not found]
        kinds = {kind for kind in nowhere if refusal(next(iter(self.heads[kind].values())).need, self.devices)}
        for job in self.waiting if kinds else ():
            if job.kind in kinds:
                yield Refuse(job.job_id, job.need.total_bytes, largest_bytes)

    def prepared(self) -> Iterator[Prefetch]:
        """For each device that runs a job, in the order in which they come free: what it brings for the next one."""
        taken = {device.prefetching_for for device in self.devices}
        for device in sorted((each for each in self.devices if each.running_need), key=lambda each: each.free_at):
            self.now = max(self.now, device.free_at)
            self.open_to_long += device.running_expected_s > self.policy.long_job_s
            job = self.next_on(device, taken - {device.prefetching_for})
            if not job or device.prefetching_for:
                continue
            if found := plan_prefetch(job.job_id, job.need, device, self.policy.min_prefetch_bytes):
                yield found

    def next_on(self, device: DeviceState, taken: Set[str | None]) -> WaitingJob | None:
        """The next job on this device once it is free, but for those that another one is prepared for."""
        while True:
            self.idle = [device]
            self.options = {
                kind: ranked_devices(next(iter(line.values())).need, self.idle) if line else []
                for kind, line in self.heads.items()
            }
            found = self.first()
            if found is None:
                return None
            self.take(*found)
            if found[0].job_id not in taken:
                return found[0]

    def first(self) -> tuple[WaitingJob, DeviceState] | None:
        """The next job to start, and where; None if no idle device can hold any."""
        job = (
            self.by_priority(lambda priority: priority > 0)  # 2
            or self.overdue()  # 3
            or self.fairest(longest_s=math.inf if self.open_to_long > 0 else self.policy.long_job_s)  # 4, 5
            or self.fairest(longest_s=math.inf)  # 5
            or self.by_priority(lambda priority: priority < 0)  # 6
        )
        return (job, self.options[job.kind][0][1]) if job else None  # 7

    def by_priority(self, wanted: Callable[[int], bool]) -> WaitingJob | None:
        if not self.has_priorities:
            return None
        heads = (job for kind, line in self.heads.items() if self.options[kind] for job in line.values())
        return max((job for job in heads if wanted(job.priority)), key=lambda job: job.priority, default=None)

    def overdue(self) -> WaitingJob | None:
        """Of the users' oldest jobs, the one that might have been the next for the longest, if that is too long."""
        late = [
            job
            for job in self.oldest.values()
            if self.since(job) < self.now - self.policy.max_wait_s and self.options[job.kind]
        ]
        return min(late, key=self.since, default=None)

    def since(self, job: WaitingJob) -> float:
        return max(job.created_at, self.shares.last_start_at.get(job.user_id, job.created_at))

    def fairest(self, longest_s: float) -> WaitingJob | None:
        """Of each kind, only the user who has had least can be it."""
        firsts = [job for kind, found in self.options.items() if found and (job := self.least_served(kind))]
        return min((job for job in firsts if job.expected_s <= longest_s), key=self.cost_s, default=None)

    def least_served(self, kind: str) -> WaitingJob | None:
        if kind not in self.least:
            heads = [job for job in self.heads[kind].values() if job.priority == 0]
            self.least[kind] = min(heads, key=lambda job: self.virtual_time_s[job.user_id], default=None)
        return self.least[kind]

    def cost_s(self, job: WaitingJob) -> float:
        load_s = self.options[job.kind][0][0]
        stay_s = max(
            0.0, self.policy.switch_penalty * load_s - self.policy.switch_penalty_decay * (self.now - job.created_at)
        )
        return self.virtual_time_s[job.user_id] + self.policy.length_bias * job.expected_s + stay_s

    def take(self, job: WaitingJob, device: DeviceState) -> None:
        """The job has started: the device is busy, the next of the line comes forward, its user has had more."""
        self.idle = [other for other in self.idle if other is not device]
        for kind, found in self.options.items():
            self.options[kind] = [option for option in found if option[1] is not device]
        self.virtual_time_s[job.user_id] += job.expected_s / job.weight
        self.open_to_long -= job.expected_s > self.policy.long_job_s
        self.least = {kind: other for kind, other in self.least.items() if other and other.user_id != job.user_id}
        self.advance(job)
        if self.oldest.get(job.user_id) is job:
            del self.oldest[job.user_id]  # the user's turn has come; the next job's time starts now

    def advance(self, job: WaitingJob) -> None:
        """The next of the line that `job` was the head of; more may have been learned of it than of `job`."""
        index = self.lines.index(job.line)
        self.lines[index] = ""
        del self.heads[job.kind][job.line]
        if job.line in self.lines[index:]:
            following = self.waiting[self.lines.index(job.line, index)]
            self.heads[following.kind][following.line] = following
            self.least.pop(following.kind, None)
            if following.kind not in self.options:
                self.options[following.kind] = ranked_devices(following.need, self.idle)


def first_of_each(jobs: Iterable[WaitingJob], names: Sequence[str]) -> dict[str, WaitingJob]:
    """The first job of each name, in the order of the jobs."""
    found: dict[str, WaitingJob] = {}
    for name, job in zip(names, jobs, strict=True):
        found.setdefault(name, job)
    return found
