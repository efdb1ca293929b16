"""The open server: no key, no limits, for this machine only."""

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import settings
from server.cli.main import app as cli
from server.settings import OpenToAll, Settings
from tests.support.app import GENERATE, InProcessApp, app_test

BODY = {"prompt": "work", "model": "dear"}


@app_test(open=True)
async def test_no_key_is_needed_and_a_wrong_one_is_ignored(app: InProcessApp):
    for client in (app.client(), app.client("bnp_whatever")):
        answer = await client.post(GENERATE, json=BODY)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Credits-Charged"] == "4" and "RateLimit" not in answer.headers
    assert (await app.client().get("/api/admin/users")).status_code == 200, "there is one user, who runs the server"
    assert {row["email"] for row in app.rows("SELECT email FROM job JOIN user ON user.id = user_id")} == {
        "owner@localhost"
    }


@app_test(open=True)
async def test_charges_are_recorded_and_never_refused(app: InProcessApp):
    client = app.client()
    owner = app.rows("SELECT * FROM user")[0]
    with app.store.database.atomic() as db:
        db.execute("UPDATE user SET balance = 2, plan = 'free'")
    answers = await asyncio.gather(*(client.post(GENERATE, json=BODY) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert (await client.get("/api/credits")).json()["balance"] == 0
    entries = app.rows(
        "SELECT kind, sum(amount) AS amount, count(*) AS n FROM ledger WHERE note IS NULL OR note = 'open'"
        " GROUP BY kind ORDER BY kind"
    )
    assert entries == [{"kind": "charge", "amount": -80, "n": 20}, {"kind": "grant", "amount": 78, "n": 20}]
    assert owner["role"] == "admin"


@app_test(open=True, public_url="https://studio.example")
async def test_pages_of_other_sites_may_not_use_it(app: InProcessApp):
    client = app.client()
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
    ):
        refused = await client.post(GENERATE, json=BODY, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (403, "INVALID_ORIGIN"), headers
    assert (await client.get("/api/jobs", headers={"Host": "evil.example"})).status_code == 403
    for headers in (
        {"Origin": "http://127.0.0.1:8000"},
        {"Host": "localhost:8000"},
        {"Host": "studio.example"},
        {"Host": "[::1]:8000"},
        {"Origin": "https://studio.example"},
    ):
        assert (await client.post(GENERATE, json=BODY, headers=headers)).status_code == 200, headers


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_open_on_this_machine(host: str):
    settings.check_settings(Settings(host=host, open=True))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "studio.example"])
def test_open_to_the_network_needs_a_second_option(host: str):
    with pytest.raises(OpenToAll, match="--open-to-the-network"):
        settings.check_settings(Settings(host=host, open=True))
    settings.check_settings(Settings(host=host, open=True, open_to_the_network=True))
    settings.check_settings(Settings(host=host))


def test_the_command_refuses_in_one_line(tmp_path: Path):
    result = CliRunner().invoke(cli, ["serve", "--open", "--host", "0.0.0.0", "--data", str(tmp_path / "data")])
    assert result.exit_code == 1
    assert "--open-to-the-network" in result.output and "Traceback" not in result.output


@app_test()
async def test_without_open_a_key_is_needed(app: InProcessApp):
    refused = await app.client().post(GENERATE, json=BODY)
    assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHORIZED")
    assert refused.headers["WWW-Authenticate"].startswith("Bearer")
