"""A job that waits, as the decisions see it. Pure."""

import sys
from dataclasses import dataclass
from functools import cached_property

from server.vram import Need


@dataclass(frozen=True)
class Waiting:
    """A queued job. A plan reads a sequence of them, oldest first. `priority` is 0 unless an admin said otherwise.

    Jobs of one `group` are alike to their user, who expects them in order, whatever was learned between their submits.
    """

    job_id: str
    need: Need
    user_id: str = ""
    weight: float = 1.0
    priority: int = 0
    expected_s: float = 1.0
    created_at: float = 0.0
    group: str = ""

    @cached_property
    def kind(self) -> str:
        """Jobs of one kind are alike to a device. A string, since it remembers its hash; and one for all that are."""
        return sys.intern(f"{hash(self.need)} {self.expected_s:.2g}")

    @cached_property
    def line(self) -> str:
        """Jobs of one line are taken one after the other: one user's, of one group (else kind) and priority."""
        return sys.intern(f"{self.priority} {self.user_id} {self.group or self.kind}")
