"""Better Auth's official client, unchanged, from 1.3 to 1.7, on Node over a real socket."""

from pathlib import Path

import pytest

from tests.support.auth_server import auth_server, installed, run_checks

TRUSTED = ("https://studio.example",)


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    installed()


@pytest.mark.parametrize("package", ["better-auth", "better-auth-1-4", "better-auth-1-3"])
def test_the_official_client_does_all_it_can(tmp_path: Path, package: str):
    with auth_server(tmp_path, trusted_origins=TRUSTED) as served:
        report = run_checks("client.mjs", package, served)
    assert report.failed == {}
    assert len(report.checked) >= 40
