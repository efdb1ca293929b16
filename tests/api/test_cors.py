"""CORS and CSRF: pages of trusted origins may call with a session, other pages may not."""

import httpx

from server.auth import sessions
from tests.support.app import GENERATE, NOW, InProcessApp, app_test

BODY = {"prompt": "work", "model": "plain"}
STUDIO, EVIL = "https://studio.example", "https://evil.example"


def browser(app: InProcessApp) -> httpx.AsyncClient:
    """A signed-in browser."""
    ada = app.create_user()
    with app.store.database.atomic() as db:
        secret = app.services.auth.secret
        token = sessions.open_session(db, secret, ada.id, NOW, address="", agent="", remember=True)
    client = app.client()
    client.headers["Cookie"] = f"better-auth.session_token={secret.sign(token)}"
    return client


@app_test()
async def test_a_session_allows_what_a_key_does(app: InProcessApp):
    client = browser(app)
    assert (await client.post(GENERATE, json=BODY)).status_code == 200
    assert (await client.get("/api/credits")).json()["balance"] == 9
    assert (await client.get("/api/usage")).json()["usage"][0]["keyId"] is None
    assert (await client.get("/api/admin/users")).json()["code"] == "SCOPE_REQUIRED"


@app_test()
async def test_writes_with_a_cookie_from_a_foreign_page_are_refused(app: InProcessApp):
    client = browser(app)
    for headers in ({"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        refused = await client.post(GENERATE, json=BODY, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (403, "INVALID_ORIGIN"), headers
    for headers in (
        {},
        {"Origin": "http://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://x.y"},
    ):
        assert (await client.post(GENERATE, json=BODY, headers=headers)).status_code == 200, headers
    key = await app.create_user("bob").make(Origin=EVIL)
    assert key.status_code == 200, "a key is nothing that a browser lends"
    assert "access-control-allow-origin" not in key.headers


@app_test(trusted_origins=(STUDIO,))
async def test_trusted_origins_may_call_and_read_the_headers(app: InProcessApp):
    client = browser(app)
    asked = {"Origin": STUDIO, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-route"}
    preflight = await client.options(GENERATE, headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == STUDIO
    assert preflight.headers["Access-Control-Allow-Credentials"] == "true"
    answer = await client.post(GENERATE, json=BODY, headers={"Origin": STUDIO})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == STUDIO
    exposed = {name.strip().lower() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
    assert {"x-credits-remaining", "ratelimit", "retry-after", "x-job-id"} <= exposed
    refused = await client.post(GENERATE, json={}, headers={"Origin": STUDIO})
    assert refused.status_code == 400 and refused.headers["Access-Control-Allow-Origin"] == STUDIO
    foreign = await client.options(GENERATE, headers=asked | {"Origin": EVIL})
    assert "access-control-allow-origin" not in foreign.headers
