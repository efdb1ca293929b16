"""`/api/auth` in-process: session lifetimes under a test clock, what is stored, and refusals."""

import asyncio
import base64
import json
import logging
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api.auth import keys, sessions, users
from server.auth import credentials
from server.auth.sessions import DAY_S
from server.settings import PROJECT
from server.timestamps import iso
from tests.support.app import NOW, InProcessApp, app_test

PASSWORD = "correct horse"
BODY = {"name": "Ada", "email": "ada@example.com", "password": PASSWORD}


async def signed_up(app: InProcessApp, **more: Any) -> httpx.AsyncClient:
    client = app.client()
    (await client.post("/api/auth/sign-up/email", json={**BODY, **more})).raise_for_status()
    client.headers["Origin"] = "http://127.0.0.1:8000"
    return client


async def session(client: httpx.AsyncClient, query: str = "") -> Any:
    return (await client.get(f"/api/auth/get-session{query}")).json()


@app_test(limit_sign_in=False)
async def test_a_session_is_renewed_once_a_day(app: InProcessApp) -> None:
    client = await signed_up(app)
    assert (await session(client))["session"]["expiresAt"] == iso(NOW + 7 * DAY_S)
    app.clock.now = NOW + DAY_S - 60
    assert (await session(client))["session"]["expiresAt"] == iso(NOW + 7 * DAY_S)
    app.clock.now = NOW + DAY_S + 60
    assert (await session(client, "?disableRefresh=true"))["session"]["expiresAt"] == iso(NOW + 7 * DAY_S)
    answer = await client.get("/api/credits")
    assert "Max-Age=604800" in answer.headers["set-cookie"]
    assert (await session(client))["session"]["expiresAt"] == iso(app.clock.now + 7 * DAY_S)


@app_test(limit_sign_in=False)
async def test_an_expired_session_is_gone_and_its_cookie_cleared(app: InProcessApp) -> None:
    client = await signed_up(app)
    app.clock.now = NOW + 7 * DAY_S
    answer = await client.get("/api/auth/get-session")
    assert answer.json() is None and len(answer.headers.get_list("set-cookie")) == 3
    assert app.rows("SELECT * FROM session") == []
    assert (await client.get("/api/credits")).status_code == 401


@app_test(limit_sign_in=False)
async def test_a_session_that_is_not_remembered_lives_a_day_however_it_is_used(app: InProcessApp) -> None:
    client = await signed_up(app, rememberMe=False)
    token = (await session(client))["session"]["token"]
    app.clock.now = NOW + DAY_S - 60
    bearer = {"Authorization": f"Bearer {token}"}
    assert (await app.client().get("/api/credits", headers=bearer)).status_code == 200
    assert (await session(client))["session"]["expiresAt"] == iso(NOW + DAY_S)
    app.clock.now = NOW + DAY_S
    assert await session(client) is None


@app_test(limit_sign_in=False)
async def test_neither_tokens_nor_passwords_are_in_the_database(app: InProcessApp) -> None:
    client = await signed_up(app)
    token = (await session(client))["session"]["token"]
    await client.post("/api/auth/request-password-reset", json={"email": BODY["email"]})
    await app.services.auth.mailer.wait()
    mail = json.loads((app.services.settings.data / "outbox.log").read_text())
    reset = mail["text"].partition("/reset-password/")[2].partition("?")[0]
    written = "\n".join(app.db.iterdump())
    assert "sealed" in written
    assert not [each for each in (token, PASSWORD, reset) if each in written]


@app_test(limit_sign_in=False)
async def test_a_reset_ends_every_session(app: InProcessApp) -> None:
    client = await signed_up(app)
    await client.post("/api/auth/request-password-reset", json={"email": "ADA@example.com"})
    await app.services.auth.mailer.wait()
    text = json.loads((app.services.settings.data / "outbox.log").read_text())["text"]
    token = text.partition("/reset-password/")[2].partition("?")[0]
    body = {"token": token, "newPassword": "another one"}
    answers = await asyncio.gather(*(app.client().post("/api/auth/reset-password", json=body) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400], "a token works once"
    assert await session(client) is None


def test_no_secret_is_in_any_log(tmp_path: Any, caplog: pytest.LogCaptureFixture):
    @app_test(limit_sign_in=False)
    async def story(app: InProcessApp) -> None:
        caplog.set_level(logging.DEBUG)
        client = await signed_up(app)
        token = (await session(client))["session"]["token"]
        created = await client.post("/api/auth/api-key/create", json={"name": "k"})
        await client.get("/api/credits", headers={"x-api-key": created.json()["key"]})
        await client.post("/api/auth/request-password-reset", json={"email": BODY["email"]})
        await app.services.auth.mailer.wait()
        reset = json.loads((app.services.settings.data / "outbox.log").read_text())["text"]
        reset = reset.partition("/reset-password/")[2].partition("?")[0]
        secrets = [token, created.json()["key"], reset, PASSWORD, app.services.auth.secret.text]
        assert not [each for each in secrets if each in caplog.text]

    story(tmp_path)


@app_test(limit_sign_in=False)
async def test_deleting_an_account_keeps_the_ledger_and_no_personal_data(app: InProcessApp) -> None:
    client = await signed_up(app)
    user_id = (await session(client))["user"]["id"]
    made = await client.post("/api/image/fal/generate", json={"prompt": "my secret garden", "model": "plain"})
    assert made.status_code == 200
    held = await client.post(
        "/api/image/fal/generate",
        json={"prompt": "hold", "model": "plain"},
        headers={"Prefer": "respond-async"},
    )
    assert held.status_code == 202
    await app.settle()
    answer = await client.post("/api/auth/delete-user", json={"password": PASSWORD})
    assert answer.json() == {"success": True, "message": "User deleted"}
    await app.settle()
    assert (await app.client().get(made.json()["imageUrl"])).status_code == 404
    written = "\n".join(app.db.iterdump())
    assert "ada@example.com" not in written and "my secret garden" not in written
    assert [row["status"] for row in app.rows("SELECT status FROM job ORDER BY seq")] == ["succeeded", "cancelled"]
    assert [row["kind"] for row in app.rows("SELECT kind FROM ledger WHERE user_id = ?", user_id)] == [
        "grant", "charge", "charge", "refund",
    ]  # fmt: skip
    assert (await app.client().post("/api/auth/sign-up/email", json=BODY)).status_code == 200


@app_test(limit_sign_in=False)
async def test_a_ban_ends_sessions_at_once_and_expires(app: InProcessApp) -> None:
    client = await signed_up(app)
    app.db.execute("UPDATE user SET banned = 1, banExpires = ? WHERE email = ?", [iso(NOW + 60), BODY["email"]])
    assert await session(client) is None
    refused = await app.client().post("/api/auth/sign-in/email", json=BODY)
    assert (refused.status_code, refused.json()["code"]) == (403, "BANNED_USER")
    app.clock.now = NOW + 61
    assert (await app.client().post("/api/auth/sign-in/email", json=BODY)).status_code == 200


@app_test(limit_sign_in=False)
async def test_a_password_that_is_changed_while_it_is_checked_opens_nothing(app: InProcessApp) -> None:
    await signed_up(app)
    user = credentials.find_by_email(app.db, BODY["email"])
    assert user
    checked = app.services.auth.passwords.matches

    async def checks_slowly(stored: str | None, password: str) -> bool:
        matched = await checked(stored, password)
        credentials.change_password(app.db, user["id"], "another hash", NOW)
        return matched

    app.services.auth.passwords.matches = checks_slowly  # type: ignore[method-assign]
    refused = await app.client().post("/api/auth/sign-in/email", json=BODY)
    assert (refused.status_code, refused.json()["code"]) == (401, "INVALID_EMAIL_OR_PASSWORD")
    assert app.rows("SELECT * FROM session") == []


@app_test()
async def test_attempts_to_sign_in_are_limited(app: InProcessApp) -> None:
    client = app.client()
    body = {"email": "ada@example.com", "password": "guess"}
    answers = [await client.post("/api/auth/sign-in/email", json=body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
    assert answers[3].headers["x-retry-after"] == answers[3].headers["retry-after"] == "10"
    assert answers[3].json()["message"] == "Too many requests. Please try again later."
    app.clock.now += 10
    assert (await client.post("/api/auth/sign-in/email", json=body)).status_code == 401


def test_every_route_is_in_the_docs():
    told = (PROJECT / "docs" / "auth.md").read_text()
    for module in (sessions, users, keys):
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            assert f"`{min(route.methods)} {route.path}`" in told, route.path


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/auth"),
        ("GET", "/api/auth/nothing"),
        ("GET", "/api/auth/sign-out"),
        ("POST", "/api/auth/ok"),
        ("GET", "/api/auth/ok/"),
        ("DELETE", "/api/auth/get-session"),
        ("OPTIONS", "/api/auth/sign-in/email"),
        ("POST", "/api/auth/api-key/verify"),
        ("POST", "/api/auth/api-key/delete-all-expired-api-keys"),
    ],
)
def test_unknown_paths_are_404_without_a_body(tmp_path: Any, method: str, path: str):
    @app_test()
    async def story(app: InProcessApp) -> None:
        answer = await app.client().request(method, path)
        assert (answer.status_code, answer.content) == (404, b"")

    story(tmp_path)


BAD_BODIES = [
    (b"{bad", "application/json", 400, "BAD_REQUEST"),
    (b"[" * 100_000, "application/json", 400, "BAD_REQUEST"),
    (b"\xff\xfe", "application/json", 400, "BAD_REQUEST"),
    (b'{"name": NaN}', "application/json", 400, "BAD_REQUEST"),
    (b"a=b", "text/plain", 415, "UNSUPPORTED_MEDIA_TYPE"),
    (b"", "application/json", 400, "VALIDATION_ERROR"),
    (b"[]", "application/json", 400, "VALIDATION_ERROR"),
    (b"{}", "application/json", 400, "VALIDATION_ERROR"),
    (b'{"name": "A", "email": "a@b.co", "password": "\\ud83c12345678"}', "application/json", 400, "VALIDATION_ERROR"),
    (b'{"name": "A", "email": "a@b.co\\n", "password": "12345678"}', "application/json", 400, "VALIDATION_ERROR"),
    (b" " * 300_000, "application/json", 413, "PAYLOAD_TOO_LARGE"),
]


@pytest.mark.parametrize(("body", "kind", "status", "code"), BAD_BODIES)
def test_bad_bodies(tmp_path: Any, body: bytes, kind: str, status: int, code: str):
    @app_test()
    async def story(app: InProcessApp) -> None:
        answer = await app.client().post("/api/auth/sign-up/email", content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert app.rows("SELECT count(*) AS users FROM user") == [{"users": 1}]

    story(tmp_path)


@app_test()
async def test_body_errors_have_upstreams_texts(app: InProcessApp) -> None:
    answer = await app.client().post("/api/auth/sign-up/email", json={"name": 5, "email": "a@b.co"})
    assert answer.json()["message"] == (
        "[body.name] Invalid input: expected string, received number; "
        "[body.password] Invalid input: expected string, received undefined"
    )


@app_test(limit_sign_in=False)
async def test_forms_sign_in_too_and_headers_full_of_garbage_are_no_session(app: InProcessApp) -> None:
    await signed_up(app)
    form = {"email": BODY["email"], "password": PASSWORD}
    assert (await app.client().post("/api/auth/sign-in/email", data=form)).status_code == 200
    for garbage in ("Bearer ", "Bearer .", "Bearer a.b", "Basic eDp5", "Bearer \u00e9".encode().decode("latin-1")):
        headers = {"authorization": garbage, "cookie": "better-auth.session_token=%zz%; ;=;x"}
        answer = await app.client().get("/api/auth/get-session", headers=httpx.Headers(headers, "latin-1"))
        assert (answer.status_code, answer.json()) == (200, None)


@app_test(public_url="https://plantain.example", limit_sign_in=False)
async def test_over_https_cookies_are_secure(app: InProcessApp) -> None:
    answer = await app.client().post("/api/auth/sign-up/email", json=BODY)
    line = answer.headers["set-cookie"]
    assert line.startswith("__Secure-better-auth.session_token=") and "; Secure; SameSite=Lax" in line


@app_test(limit_sign_in=False)
async def test_sign_up_gives_ten_credits_and_no_rights(app: InProcessApp) -> None:
    client = await signed_up(app, plan="pro", balance=9999, emailVerified=True, id="mine")
    row = app.rows("SELECT * FROM user WHERE email = ?", BODY["email"])[0]
    assert [row[name] for name in ("role", "plan", "balance", "emailVerified")] == ["user", "free", 10, 0]
    refused = await app.client().post("/api/auth/sign-up/email", json={**BODY, "role": "admin"})
    assert refused.json()["code"] == "FIELD_NOT_ALLOWED"
    assert (await client.get("/api/credits")).json()["balance"] == 10


@app_test(limit_sign_in=False)
async def test_two_sign_ups_at_once_make_one_user(app: InProcessApp) -> None:
    answers = await asyncio.gather(*(app.client().post("/api/auth/sign-up/email", json=BODY) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 422, 422, 422]
    assert len(app.rows("SELECT * FROM ledger WHERE note = 'sign-up' AND user_id != ''")) == 2, "the owner's and Ada's"


@app_test(limit_sign_in=False)
async def test_a_forged_cookie_is_no_session(app: InProcessApp) -> None:
    token = (await session(await signed_up(app)))["session"]["token"]
    forged = f"{token}.{base64.b64encode(bytes(32)).decode()}"
    for cookie in (token, forged):
        headers = {"cookie": f"better-auth.session_token={cookie}"}
        assert (await app.client().get("/api/credits", headers=headers)).status_code == 401
