"""Rate limit of `/api/auth` by client address, against password guessing."""

import ipaddress
import math
from collections import OrderedDict, deque

DEFAULT_RULE = (100, 10.0)
RULES = {
    "sign-in": (3, 10.0),
    "sign-up": (3, 10.0),
    "change-password": (3, 10.0),
    "change-email": (3, 10.0),
    "verify-password": (3, 10.0),
    "delete-user": (3, 10.0),
    "request-password-reset": (3, 60.0),
    "forget-password": (3, 60.0),
    "reset-password": (3, 60.0),
    "send-verification-email": (3, 60.0),
}
"""(calls, seconds) by the first part of the path. Upstream does not limit three of these that check a secret too."""
MAX_ENTRIES = 50_000


class SignInRateLimiter:
    """Moving windows per address and path, in memory: a restart clears them. The least recently used go first."""

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()

    def retry_after_s(self, address: str, path: str, now: float) -> int:
        """Counts a call and returns 0, or refuses it and returns the whole seconds until one is allowed."""
        max_calls, window_s = RULES.get(path.strip("/").split("/")[0], DEFAULT_RULE)
        times = self._calls.setdefault((network_of(address), path), deque())
        self._calls.move_to_end((network_of(address), path))
        while len(self._calls) > MAX_ENTRIES:
            self._calls.popitem(last=False)
        while times and times[0] <= now - window_s:
            times.popleft()
        if len(times) >= max_calls:
            return max(1, math.ceil(times[0] + window_s - now))
        times.append(now)
        return 0


def network_of(address: str) -> str:
    """The unit that is limited: an IPv4 address, or an IPv6 /64 network, which one client has all of."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
