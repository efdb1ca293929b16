"""Rate limits and concurrency limits of plans: exact counts, headers, restarts."""

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.accounts import keys, ledger, rate_limits, users
from server.accounts.keys import KeyLimit
from server.accounts.plans import Plan, Plans, PlansError
from server.db.database import Database
from server.errors import RateLimited, UsageExceeded
from server.jobs.store import JobStore
from tests.support.app import GENERATE, NOW, InProcessApp, app_test, install_test_models, serve_app


def codes(answers: list[httpx.Response]) -> Counter[str]:
    return Counter("ok" if answer.is_success else answer.json()["code"] for answer in answers)


@app_test()
async def test_of_200_concurrent_calls_exactly_the_quota_passes(app: InProcessApp):
    ada = app.create_user(plan="pro", credits=1000)
    bodies = [ada.ask(GENERATE, {"model": "plain"}) for _ in range(200)]  # no prompt: counted, and then refused
    assert codes(await asyncio.gather(*bodies)) == {"VALIDATION_ERROR": 60, "RATE_LIMITED": 140}


@app_test()
async def test_more_keys_do_not_raise_the_limit(app: InProcessApp):
    ada = app.create_user(plan="free", credits=100)
    second = app.add_key(ada.id)
    answers = [await who.make() for who in (ada, second, ada, second, ada, second, ada)]
    assert codes(answers) == {"ok": 5, "RATE_LIMITED": 2}
    assert (await app.create_user("bob", plan="free").make()).status_code == 200, "each user has a minute of their own"


@app_test()
async def test_the_window_moves(app: InProcessApp):
    ada = app.create_user(plan="free", credits=100)
    for second in range(5):
        app.clock.now = NOW + 10 * second
        assert (await ada.make()).status_code == 200
    refused = await ada.make()
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "20"
    app.clock.now = NOW + 59.9
    assert (await ada.make()).status_code == 429
    app.clock.now = NOW + 60
    assert (await ada.make()).status_code == 200
    assert (await ada.make()).headers["Retry-After"] == "10"


@app_test()
async def test_reads_and_cancellations_are_not_counted(app: InProcessApp):
    ada = app.create_user(plan="free", credits=100)
    job = (await ada.make("hold", Prefer="respond-async")).json()
    for _ in range(10):
        assert (await ada.call("GET", f"/api/jobs/{job['id']}")).status_code == 200
        assert (await ada.call("GET", "/api/credits")).status_code == 200
    assert (await ada.ask(f"/api/jobs/{job['id']}/cancel")).is_success
    assert codes([await ada.make() for _ in range(5)]) == {"ok": 4, "RATE_LIMITED": 1}


@app_test()
async def test_every_response_has_the_remaining_quota(app: InProcessApp):
    ada = app.create_user(plan="basic", credits=100)
    answer = await ada.make()
    assert answer.headers["RateLimit-Policy"] == '"minute";q=15;w=60, "concurrent";q=3;qu="concurrent-requests"'
    assert answer.headers["RateLimit"] == '"minute";r=14;t=60, "concurrent";r=3'
    assert answer.headers["X-RateLimit-Limit"] == "15"
    assert answer.headers["X-RateLimit-Remaining"] == "14"
    assert answer.headers["X-RateLimit-Reset"] == str(int(NOW + 60))
    app.clock.now += 18
    refused = await ada.make(model="nothing")
    assert refused.status_code == 404
    assert refused.headers["RateLimit"] == '"minute";r=13;t=42, "concurrent";r=3'
    running = await ada.make("hold", Prefer="respond-async")
    assert running.status_code == 202
    assert running.headers["RateLimit"] == '"minute";r=12;t=42, "concurrent";r=2'


@app_test()
async def test_over_the_rate_limit(app: InProcessApp):
    ada = app.create_user(plan="free", credits=100)
    for _ in range(5):
        await ada.make()
    app.clock.now += 18
    refused = await ada.make()
    assert refused.status_code == 429
    body = refused.json()
    assert body["code"] == "RATE_LIMITED" and body["violated-policies"] == ["minute"] and body["retryAfter"] == 42
    assert body["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert body["error"] == "Your plan allows 5 requests a minute. Try again in 42 s."
    assert refused.headers["Retry-After"] == "42"
    assert refused.headers["RateLimit"] == '"minute";r=0;t=42, "concurrent";r=1'
    assert refused.headers["X-RateLimit-Remaining"] == "0"
    assert await ada.balance() == 105, "a refused call costs nothing"


@app_test()
async def test_over_the_limit_of_concurrent_jobs(app: InProcessApp):
    ada = app.create_user(plan="basic", credits=100)
    answers = await asyncio.gather(*(ada.make("hold", Prefer="respond-async") for _ in range(15)))
    assert codes(list(answers)) == {"ok": 3, "CONCURRENCY_LIMIT": 12}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["violated-policies"] == ["concurrent"] and refused.json()["limit"] == 3
    assert refused.headers["Retry-After"] == "1" and refused.headers["RateLimit"].endswith('"concurrent";r=0')
    assert len(app.rows("SELECT * FROM ledger WHERE kind = 'charge'")) == 3
    app.release()
    await app.settle()
    app.clock.now += 60
    assert (await ada.make()).status_code == 200


@app_test()
async def test_a_concurrency_refusal_estimates_when_a_job_ends(app: InProcessApp):
    ada = app.create_user(plan="free", credits=100)
    waiting = asyncio.create_task(ada.make("hold"))
    while not app.workers[0].held:
        await app.settle()
    app.clock.now += 30
    app.release(holds=True)
    await waiting
    await ada.make("hold", Prefer="respond-async")
    await app.settle()
    app.clock.now += 10
    assert (await ada.make()).headers["Retry-After"] == "20", "the last one took 30 s, and 10 s have passed"


@app_test()
async def test_studio_has_no_limits_and_no_headers_of_them(app: InProcessApp):
    ada = app.create_user(plan="studio", credits=1000)
    answers = await asyncio.gather(*(ada.make() for _ in range(100)))
    assert codes(list(answers)) == {"ok": 100}
    assert "RateLimit" not in answers[0].headers and "X-RateLimit-Limit" not in answers[0].headers


@app_test()
async def test_a_key_may_have_a_limit_of_its_own(app: InProcessApp):
    ada = app.create_user(plan="basic", credits=100)
    narrow = app.add_key(ada.id, per_minute=2)
    answers = [await narrow.make() for _ in range(3)]
    assert codes(answers) == {"ok": 2, "RATE_LIMITED": 1}
    assert answers[2].json()["violated-policies"] == ["key"]
    assert answers[1].headers["X-RateLimit-Limit"] == "2" and '"key";q=2;w=60' in answers[1].headers["RateLimit-Policy"]
    assert (await ada.make()).headers["RateLimit"].startswith('"minute";r=12')


def test_limits_hold_across_a_restart(tmp_path: Path):
    async def serve(calls: int) -> Counter[str]:
        async with serve_app(settings_) as app:
            people = app.rows("SELECT id FROM user WHERE email = 'ada@example.com'")
            ada = app.add_key(people[0]["id"]) if people else app.create_user(plan="free", credits=100)
            return codes([await ada.make() for _ in range(calls)])

    settings_ = install_test_models(tmp_path)
    assert asyncio.run(serve(3)) == {"ok": 3}
    assert asyncio.run(serve(5)) == {"ok": 2, "RATE_LIMITED": 3}


@app_test()
async def test_authentication_comes_before_the_limit_and_the_limit_before_the_body(app: InProcessApp):
    ada = app.create_user(plan="free")
    for _ in range(5):
        await ada.ask(GENERATE, {})
    assert (await ada.ask(GENERATE, {})).json()["code"] == "RATE_LIMITED"
    stranger = await app.client("bnp_" + "x" * 64).post(GENERATE, json={})
    assert stranger.json()["code"] == "INVALID_API_KEY"


@app_test()
async def test_the_body_comes_before_the_slot_and_the_slot_before_the_credits(app: InProcessApp):
    ada = app.create_user(plan="basic", credits=-9)
    await ada.make("hold", Prefer="respond-async")
    for _ in range(2):
        assert (await ada.make()).json()["code"] == "INSUFFICIENT_CREDITS"
    with app.store.database.atomic() as db:
        ledger.grant(db, ada.id, 2, "test", NOW)
    for _ in range(2):
        await ada.make("hold", Prefer="respond-async")
    assert (await ada.ask(GENERATE, {"model": "plain"})).json()["code"] == "VALIDATION_ERROR"
    assert (await ada.make()).json()["code"] == "CONCURRENCY_LIMIT"


@app_test()
async def test_200_charges_against_a_balance_that_covers_50(app: InProcessApp):
    ada = app.create_user(plan="studio", credits=40)
    answers = await asyncio.gather(*(ada.make() for _ in range(200)))
    assert codes(list(answers)) == {"ok": 50, "INSUFFICIENT_CREDITS": 150}
    assert await ada.balance() == 0
    refused = next(answer for answer in answers if answer.status_code == 402)
    assert refused.json()["required"] == 1 and "Retry-After" not in refused.headers


# The window itself


@pytest.fixture
def store(tmp_path: Path):
    opened = JobStore(Database(tmp_path / "plantain.sqlite"))
    yield opened
    opened.database.close()


CALLS = st.lists(st.floats(0, 200).map(lambda second: NOW + second), max_size=60).map(sorted)


@given(CALLS, st.integers(1, 8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_no_window_ever_exceeds_the_quota_and_no_fitting_call_is_refused(
    store: JobStore, calls: list[float], most: int
):
    user = users.create_user(store.db, "Ada", f"{users.random_id()}@example.com", NOW)
    passed: list[float] = []
    for now in calls:
        fits = len([past for past in passed if past > now - 60]) < most
        try:
            with store.database.atomic() as db:
                rate_limits.count_call(db, user, Plan("x", most), None, now)
            passed.append(now)
            assert fits
        except RateLimited as refused:
            assert not fits
            assert refused.extra["retryAfter"] >= 1
    assert len(store.db.execute("SELECT 1 FROM call WHERE user_id = ?", [user]).fetchall()) <= len(passed)


def test_after_a_downgrade_retry_after_waits_for_enough_calls_to_expire(store: JobStore):
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    for second in range(10):
        rate_limits.count_call(store.db, user, Plan("large", 60), None, NOW + second)
    with pytest.raises(RateLimited) as refused:
        rate_limits.count_call(store.db, user, Plan("small", 5), None, NOW + 10)
    assert refused.value.extra["retryAfter"] == 55, "six of the ten have to leave, the sixth came at second 5"


def test_calls_dated_in_the_far_future_do_not_block_a_user(store: JobStore):
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    rate_limits.count_call(store.db, user, Plan("x", 3), None, NOW + 86_400)
    rate_limits.count_call(store.db, user, Plan("x", 3), None, NOW)
    standing = rate_limits.count_call(store.db, user, Plan("x", 3), None, NOW)
    assert standing.windows[0].used == 2


def test_a_key_with_a_call_quota_stops_at_it(store: JobStore):
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    key_id, _ = keys.create_key(store.db, user, "few", NOW)
    store.db.execute("UPDATE apikey SET remaining = 1 WHERE id = ?", [key_id])
    rate_limits.count_call(store.db, user, Plan("x"), KeyLimit(key_id, remaining_calls=1), NOW)
    with pytest.raises(UsageExceeded):
        rate_limits.count_call(store.db, user, Plan("x"), KeyLimit(key_id, remaining_calls=0), NOW)


# Plans as data


def test_the_documented_plans():
    plans = Plans.load()
    assert {name: (plan.requests_a_minute, plan.jobs_at_once) for name, plan in plans.items()} == {
        "free": (5, 1),
        "basic": (15, 3),
        "standard": (30, 5),
        "pro": (60, 10),
        "studio": (None, None),
    }


def test_an_operator_changes_and_adds_plans(tmp_path: Path):
    (tmp_path / "plans.toml").write_text("[free]\nrequests_a_minute = 7\n[lab]\njobs_at_once = 2\nweight = 0.5\n")
    plans = Plans.load(tmp_path / "plans.toml")
    assert plans["free"] == Plan("free", 7) and plans["lab"] == Plan("lab", None, 2, 0.5)
    assert plans.of("pro").requests_a_minute == 60
    assert plans.of("gone") == plans["free"]


@pytest.mark.parametrize(
    "text", ["[free]\nrpm = 1", "[free]\nweight = 0", "free = 1", "[free]\njobs_at_once = true", "["]
)
def test_a_plan_that_cannot_be_is_refused_with_its_file(tmp_path: Path, text: str):
    path = tmp_path / "plans.toml"
    path.write_text(text)
    with pytest.raises(PlansError, match=r"plans\.toml"):
        Plans.load(path)
