"""Idempotency-Key: a repeated call is one job, one charge and one response."""

import asyncio
from pathlib import Path

import pytest

from server.errors import IdempotencyKeyInvalid
from server.jobs import idempotency
from tests.support.app import GENERATE, InProcessApp, app_test, install_test_models, picture, serve_app

KEY = {"Idempotency_Key": "order-66"}


@app_test()
async def test_the_same_key_and_body_get_the_same_response_and_one_charge(app: InProcessApp):
    ada = app.create_user()
    first = await ada.make(hue="x", **KEY)
    second = await ada.make(hue="x", **KEY)
    assert second.status_code == 200 and second.json() == first.json()
    assert second.headers["Idempotent-Replayed"] == "true" and "Idempotent-Replayed" not in first.headers
    for header in ("X-Job-Id", "X-Credits-Charged", "X-Credits-Remaining", "X-Served-By"):
        assert second.headers[header] == first.headers[header]
    assert await ada.balance() == 9


@app_test()
async def test_the_fields_that_had_no_effect_are_named_again(app: InProcessApp):
    ada = app.create_user()
    body = {"prompt": "work", "model": "plain", "hue": "red", "negativePrompt": "x"}
    answers = [await ada.ask(GENERATE, body, **KEY) for _ in range(2)]
    assert [answer.headers["X-Ignored-Fields"] for answer in answers] == ["hue, negativePrompt"] * 2


@app_test()
async def test_keys_are_scoped_to_their_route(app: InProcessApp):
    ada = app.create_user()
    calls = [(f"/api/image/fal/{route}", {"imageUrl": picture()}) for route in ("upscale", "remove-bg")]
    calls.append((GENERATE, {"prompt": "work", "model": "plain"}))
    for path, body in calls:
        first = await ada.ask(path, body, **KEY)
        assert first.status_code == 200, first.text
        assert (await ada.ask(path, body, **KEY)).json() == first.json()
    assert await ada.balance() == 7


@app_test()
async def test_another_body_is_refused(app: InProcessApp):
    ada = app.create_user()
    await ada.make("work", **KEY)
    refused = await ada.make("work harder", **KEY)
    assert (refused.status_code, refused.json()["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert await ada.balance() == 9


@app_test()
async def test_the_formatting_of_the_body_makes_no_difference(app: InProcessApp):
    ada = app.create_user()
    texts = ['{"prompt":"a","model":"plain"}', '{ "model": "plain", "prompt": "\\u0061", "seed": null }']
    answers = [await ada.client.post(GENERATE, content=text, headers={"Idempotency-Key": "k"}) for text in texts]
    assert answers[1].json() == answers[0].json()


@app_test()
async def test_two_concurrent_calls_are_charged_once(app: InProcessApp):
    ada = app.create_user(plan="free")
    answers = await asyncio.gather(*(ada.make(**KEY) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["imageUrl"] for answer in answers}) == 1
    assert sorted("Idempotent-Replayed" in answer.headers for answer in answers) == [False] + [True] * 4
    assert await ada.balance() == 9


@app_test()
async def test_two_concurrent_uploads_leave_no_orphaned_file(app: InProcessApp):
    ada = app.create_user()
    body = {"imageUrl": picture()}
    await asyncio.gather(*(ada.ask("/api/image/fal/upscale", body, **KEY) for _ in range(5)))
    files = {path.name for path in app.services.files.root.iterdir()}
    assert len(files) == 2, "one input, one output"


@app_test()
async def test_while_the_first_call_runs_the_second_waits_for_it(app: InProcessApp):
    ada = app.create_user(plan="free")
    first = asyncio.create_task(ada.make("hold", **KEY))
    while not app.workers[0].held:
        await app.settle()
    second = asyncio.create_task(ada.make("hold", **KEY))
    asked = await ada.make("hold", Prefer="respond-async", **KEY)
    assert (asked.status_code, asked.json()["status"]) == (202, "running")
    assert asked.headers["Idempotent-Replayed"] == "true"
    assert not first.done() and not second.done()
    app.release()
    assert (await second).json() == (await first).json()
    assert await ada.balance() == 9


@app_test()
async def test_a_generation_that_failed_fails_again_for_the_same_key(app: InProcessApp):
    ada = app.create_user()
    answers = [await ada.make("fail GENERATION_FAILED", **KEY) for _ in range(2)]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(500, "GENERATION_FAILED")] * 2
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    assert answers[1].headers["X-Job-Id"] == answers[0].headers["X-Job-Id"]
    assert await ada.balance() == 10


@app_test()
async def test_a_failure_for_lack_of_capacity_is_retried(app: InProcessApp):
    ada = app.create_user()
    answers = [await ada.make("fail DOES_NOT_FIT", **KEY) for _ in range(3)]
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "DOES_NOT_FIT")}
    assert len({answer.headers["X-Job-Id"] for answer in answers}) == 3
    assert len(app.rows("SELECT * FROM idempotency")) == 1


@app_test()
async def test_a_request_refused_before_it_is_a_job_is_not_stored(app: InProcessApp):
    ada = app.create_user(credits=-10)
    assert (await ada.make(**KEY)).status_code == 402
    app.db.execute("UPDATE user SET balance = 5 WHERE id = ?", [ada.id])
    assert (await ada.make(**KEY)).status_code == 200


@app_test()
async def test_a_replay_needs_no_free_slot_and_no_credits_but_counts_as_a_call(app: InProcessApp):
    ada = app.create_user(plan="free", credits=-9)
    await ada.make(**KEY)
    with app.store.database.atomic() as db:
        db.execute("UPDATE user SET balance = 1 WHERE id = ?", [ada.id])
    await ada.make("hold", Prefer="respond-async")
    for _ in range(3):
        assert (await ada.make(**KEY)).status_code == 200
    assert (await ada.make(**KEY)).json()["code"] == "RATE_LIMITED"


@app_test()
async def test_a_key_belongs_to_its_user_and_expires_after_a_day(app: InProcessApp):
    ada, bob = app.create_user(), app.create_user("bob")
    first = await ada.make(**KEY)
    assert (await bob.make(**KEY)).json() != first.json()
    app.clock.now += idempotency.KEY_LIFETIME_S - 1
    assert (await ada.make(**KEY)).json() == first.json()
    app.clock.now += 1
    assert (await ada.make(**KEY)).json() != first.json()
    assert len(app.rows("SELECT * FROM idempotency")) == 1, "what is older is gone"


def test_a_key_survives_a_restart_and_so_does_its_running_job(tmp_path: Path):
    settings = install_test_models(tmp_path)

    async def before() -> tuple[str, str]:
        async with serve_app(settings) as app:
            ada = app.create_user()
            job = (await ada.make("hold", Prefer="respond-async", **KEY)).json()
            await app.settle()
            return ada.id, job["id"]

    async def after(user_id: str) -> list[str]:
        async with serve_app(settings) as app:
            ada = app.add_key(user_id)
            waiting = asyncio.create_task(ada.make("hold", **KEY))
            while not app.workers[0].held:
                await app.settle()
            app.release()
            return [(await waiting).headers["X-Job-Id"], str(await ada.balance())]

    user_id, job_id = asyncio.run(before())
    assert asyncio.run(after(user_id)) == [job_id, "9"]


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        ('"a \\"b\\" \\\\c"', 'a "b" \\c'),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ("x" * 255, "x" * 255),
    ],
)
def test_bare_and_quoted_keys(header: str, key: str):
    assert idempotency.parse([header]) == key


@pytest.mark.parametrize("header", ["", '""', "a b", '"abc', 'abc"', 'a"b', '"a\\b"', "ä", "x" * 256, "a, b", "a\tb"])
def test_malformed_keys(header: str):
    with pytest.raises(IdempotencyKeyInvalid):
        idempotency.parse([header])


@app_test()
async def test_a_malformed_key_is_refused_before_anything_is_charged(app: InProcessApp):
    ada = app.create_user()
    refused = await ada.make(Idempotency_Key="a b")
    assert (refused.status_code, refused.json()["code"]) == (400, "IDEMPOTENCY_KEY_INVALID")
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    twice = await ada.client.post(GENERATE, json={"prompt": "a", "model": "plain"}, headers=headers)
    assert twice.status_code == 400
    assert await ada.balance() == 10
