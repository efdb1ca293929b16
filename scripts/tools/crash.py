"""Kill a busy server and its workers a few hundred times, and print what was lost."""

import sys
import tempfile
import time
from pathlib import Path

from tests.support.crash import strike


def main(kills: int = 300) -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        toll = strike(Path(folder), kills, seed=time.time_ns())
    killed = ", ".join(f"{count} of a {what}" for what, count in sorted(toll.kills.items()))
    ended = ", ".join(f"{count:,} {status}" for status, count in sorted(toll.jobs.items()))
    print(f"{toll.kills.total()} kills ({killed}) in {time.monotonic() - started:.0f} s; jobs: {ended}")
    print(f"lost: {len(toll.lost)}", *toll.lost[:20], sep="\n  ")
    return len(toll.lost)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) > 0)
