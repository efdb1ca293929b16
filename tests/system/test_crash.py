"""Crash safety: server or worker killed at any moment loses nothing. `scripts/crash` kills more often."""

from pathlib import Path

from tests.support.crash import strike


def test_forty_kills_lose_nothing(tmp_path: Path):
    toll = strike(tmp_path, kills=40, successes=11)
    assert toll.lost == []
    assert toll.kills.total() == 40 and toll.kills["server"] > 3 and toll.kills["worker"] > 3
    assert toll.jobs["succeeded"] > 10
