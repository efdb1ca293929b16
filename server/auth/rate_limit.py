"""How often one address may call `/api/auth`: what keeps a guesser from trying passwords."""

import ipaddress
import math
from collections import OrderedDict, deque

EVERY = (100, 10.0)
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
"""Calls and seconds, by the first part of the path. Upstream leaves three of them unlimited that also test a secret."""
MOST_KEPT = 50_000


class SignInRateLimiter:
    """Moving windows, in memory: a restart forgives. The address that was quiet longest is forgotten first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()

    def retry_after_s(self, address: str, path: str, now: float) -> int:
        """Count a call, and 0; or do not count it, and the whole seconds until it would be taken."""
        most, window_s = RULES.get(path.strip("/").split("/")[0], EVERY)
        times = self._seen.setdefault((network_of(address), path), deque())
        self._seen.move_to_end((network_of(address), path))
        while len(self._seen) > MOST_KEPT:
            self._seen.popitem(last=False)
        while times and times[0] <= now - window_s:
            times.popleft()
        if len(times) >= most:
            return max(1, math.ceil(times[0] + window_s - now))
        times.append(now)
        return 0


def network_of(address: str) -> str:
    """One who has an IPv6 address has 2^64 of them."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
