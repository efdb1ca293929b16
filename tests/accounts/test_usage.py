"""Usage: counted by day, key, model and place; as JSON and CSV; what fal would have taken."""

import csv
import io
from pathlib import Path

import pytest

from pipelines.catalog.catalog import Credits
from server.accounts.pricing import FalPrice, PricesError, fal_prices, price_of
from server.api.dependencies import MAX_DAYS
from tests.support.app import NOW, InProcessApp, app_test
from tests.support.weights_samples import a_model

DAY_S = 86_400.0


async def a_weeks_work(app: InProcessApp) -> str:
    """Ada's: on the first day two pictures and a failure, on the second one with another key. Bob's: one."""
    ada = app.create_user(credits=90)
    await ada.make()
    await ada.make(model="dear")
    await ada.make("fail GENERATION_FAILED")
    app.clock.now = NOW + DAY_S
    await app.add_key(ada.id).make()
    await app.create_user("bob").make()
    return ada.key


@app_test()
async def test_by_day_key_and_model(app: InProcessApp):
    ada = app.client(await a_weeks_work(app))
    found = (await ada.get("/api/usage")).json()
    lines = [(line["day"], line["model"], line["calls"], line["failures"], line["credits"]) for line in found["usage"]]
    assert lines == [
        ("2026-09-22", "plain", 1, 0, 1),
        ("2026-09-21", "dear", 1, 0, 4),
        ("2026-09-21", "plain", 2, 1, 1),
    ]
    assert {line["servedBy"] for line in found["usage"]} == {"local"}
    assert len({line["keyId"] for line in found["usage"]}) == 2 and found["usage"][0]["keyName"] == "test"
    assert found["totals"]["calls"] == 4 and found["totals"]["credits"] == 6 and found["totals"]["failures"] == 1
    assert (found["from"], found["to"], found["nextCursor"]) == ("2026-08-24", "2026-09-22", None)


@app_test()
async def test_days_are_chosen(app: InProcessApp):
    ada = app.client(await a_weeks_work(app))
    found = (await ada.get("/api/usage?from=2026-09-21&to=2026-09-21")).json()
    assert found["totals"]["calls"] == 3
    for query in ("from=2026-09-22&to=2026-09-21", "from=2024-01-01&to=2026-01-01", "from=yesterday"):
        assert (await ada.get(f"/api/usage?{query}")).json()["code"] == "VALIDATION_ERROR"
    assert MAX_DAYS == 366


@app_test()
async def test_admins_see_everyones(app: InProcessApp):
    await a_weeks_work(app)
    found = await app.owner().read("/api/admin/usage")
    assert {line["email"] for line in found["usage"]} == {"ada@example.com", "bob@example.com"}
    bob = app.rows("SELECT id FROM user WHERE email = 'bob@example.com'")[0]["id"]
    assert (await app.owner().read(f"/api/admin/usage?user={bob}"))["totals"]["calls"] == 1


@app_test()
async def test_seconds_on_the_device_are_local_ones(app: InProcessApp):
    ada = app.create_user()
    job = (await ada.make("hold", Prefer="respond-async")).json()
    await app.settle()
    app.clock.now += 12.5
    app.release()
    await app.settle()
    assert (await ada.read("/api/usage"))["totals"]["deviceS"] == 12.5
    app.db.execute("UPDATE job SET served_by = 'fal' WHERE id = ?", [job["id"]])
    found = await ada.read("/api/usage")
    assert (found["usage"][0]["servedBy"], found["totals"]["deviceS"]) == ("fal", 0.0)


@app_test()
async def test_csv_is_for_spreadsheets_and_carries_no_formulas(app: InProcessApp):
    ada = app.create_user()
    app.db.execute("UPDATE apikey SET name = '=HYPERLINK(1)'")
    await ada.make()
    answer = await ada.call("GET", "/api/usage?format=csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="usage-2026-08-23-2026-09-21.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["day"], row["keyName"], row["model"], row["calls"]) for row in rows] == [
        ("2026-09-21", "'=HYPERLINK(1)", "plain", "1")
    ]
    assert (await ada.read("/api/usage"))["usage"][0].keys() == rows[0].keys()


@app_test()
async def test_what_fal_would_have_taken_is_null_where_no_price_is_known(app: InProcessApp):
    ada = app.create_user()
    await ada.make()
    assert (await ada.read("/api/usage"))["totals"]["falCostUsd"] is None
    app.services.fal_prices["plain"] = FalPrice(per_call=0.01, per_megapixel=1.0)
    found = await ada.read("/api/usage")
    assert found["usage"][0]["falCostUsd"] == found["totals"]["falCostUsd"] == round(0.01 + 64 * 64 / 1e6, 6)
    await ada.make(model="dear")
    assert (await ada.read("/api/usage"))["totals"]["falCostUsd"] is None, "a sum that leaves something out misleads"


def test_fal_prices_are_the_operators_own_table(tmp_path: Path):
    path = tmp_path / "fal-prices.toml"
    assert fal_prices(path) == {}
    path.write_text('[flux-schnell]\nper_megapixel = 0.5\n["kling-1.6"]\nper_second = 2\n')
    assert fal_prices(path) == {"flux-schnell": FalPrice(per_megapixel=0.5), "kling-1.6": FalPrice(per_second=2)}
    for wrong in ("[a]\nper_image = 1", "[a]\nper_call = -1", "a = 1", '[a]\nper_call = "1"'):
        path.write_text(wrong)
        with pytest.raises(PricesError, match="fal-prices"):
            fal_prices(path)


@pytest.mark.parametrize(
    ("credits", "params", "price"),
    [
        (Credits(3), {"prompt": "a cat"}, 3),
        (Credits(2, 1), {"duration": 5.0}, 7),
        (Credits(2, 1), {"duration": 5.04}, 8),
        (Credits(0, 2), {"duration": 6}, 12),
        (Credits(2, 1, {"720p": 2}), {"duration": 5.0, "resolution": "720p"}, 14),
        (Credits(2, 1, {"720p": 2}), {"duration": 5.0, "resolution": "480p"}, 7),
        (Credits(1, 0, {"4k": 1.5}), {"resolution": "4k"}, 2),
    ],
)
def test_prices(credits: Credits, params: dict, price: int):
    assert price_of(a_model(credits=credits), params) == price
