"""Isolation of users: every route of the app is called as another user, and without credentials.

A new route fails here until the test knows how to call it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from server.accounts import ledger
from server.auth import sessions
from tests.support.app import GENERATE, NOW, ApiUser, InProcessApp, app_test, picture

PUBLIC = {
    "/api/openapi.json", "/api/docs", "/docs/oauth2-redirect", "/redoc", "/healthz", "/readyz",
    "/files/{name}",  # whoever knows a file's unguessable name may read it, as with the hosted service's links
}  # fmt: skip
"""Needs no key and returns no user's data."""

AUTH = "/api/auth"
"""Better Auth's routes, which have their own error for a missing session."""

PROMPT, NAME, KEY_NAME, NOTE = "work on ada's secret", "Ada Secret", "ada's camera", "ada's bonus"
ASYNC = {"Prefer": "respond-async"}
"""The only worker runs a job that no other user may cancel."""
PASSWORD = "correct horse battery"


@dataclass
class Victim:
    """A user with one row of everything."""

    id: str
    email: str
    key: str
    key_id: str
    token: str
    job_id: str
    running_id: str
    file: str
    upload: str

    def secrets(self) -> list[str]:
        """What must not be in a response to another user. Ids are not secret: the other user sends them."""
        return [PROMPT, NAME, KEY_NAME, NOTE, self.email, self.file, self.upload, self.key]


def parameters(ada: Victim) -> dict[str, str]:
    """What to put into a path, by the parameter's name."""
    return {
        "job_id": ada.running_id,
        "key_id": ada.key_id,
        "user_id": ada.id,
        "token": ada.token,
        "rest": "nothing",
        "device": "cpu",
    }


NAMES = {"/api/models/{name}": "plain"}
"""What `name` is, by path: with `/files/{name}` it is the file's."""


def bodies(ada: Victim) -> dict[str, Any]:
    """What to send, by path."""
    theirs = {"keyId": ada.key_id, "id": ada.key_id, "name": "stolen", "enabled": False}
    new_user = {"email": "new@example.com", "name": "New", "password": PASSWORD}
    mail = {"email": ada.email, "redirectTo": "/"}
    return {
        GENERATE: {"prompt": "work", "model": "plain"},
        "/api/image/fal/upscale": {"imageUrl": picture()},
        "/api/image/fal/remove-bg": {"imageUrl": picture()},
        "/api/video/fal/generate": {"prompt": "work", "model": "plain"},
        "/api/uploads": {},
        "/api/jobs/{job_id}/cancel": None,
        "/api/admin/users": new_user,
        "/api/admin/users/{user_id}": {"plan": "studio"},
        "/api/admin/users/{user_id}/grants": {"amount": 5},
        "/api/admin/users/{user_id}/ban": {},
        "/api/admin/keys": {"userId": ada.id},
        "/api/admin/keys/{key_id}": {"name": "stolen"},
        "/api/admin/jobs/{job_id}/cancel": None,
        "/api/admin/queue/pause": None,
        "/api/admin/queue/resume": None,
        "/api/admin/devices/{device}/drain": None,
        "/api/admin/devices/{device}/resume": None,
        "/api/admin/jobs/{job_id}/front": None,
        "/api/admin/jobs/{job_id}/priority": {"priority": 1},
        f"{AUTH}/sign-up/email": new_user,
        f"{AUTH}/sign-in/email": {"email": ada.email, "password": "a wrong password"},
        f"{AUTH}/sign-out": {},
        f"{AUTH}/get-session": {},
        f"{AUTH}/revoke-session": {"token": ada.token},
        f"{AUTH}/revoke-sessions": {},
        f"{AUTH}/revoke-other-sessions": {},
        f"{AUTH}/update-user": {"name": "Bob"},
        f"{AUTH}/change-password": {"currentPassword": "a wrong password", "newPassword": PASSWORD},
        f"{AUTH}/verify-password": {"password": PASSWORD},
        f"{AUTH}/request-password-reset": mail,
        f"{AUTH}/forget-password": mail,
        f"{AUTH}/reset-password": {"token": ada.token, "newPassword": PASSWORD},
        f"{AUTH}/delete-user": {},
        f"{AUTH}/send-verification-email": mail,
        f"{AUTH}/change-email": {"newEmail": "b@example.com"},
        f"{AUTH}/sign-in/social": {"provider": "x"},
        f"{AUTH}/link-social": {"provider": "x"},
        f"{AUTH}/api-key/create": {"name": "mine"},
        f"{AUTH}/api-key/update": theirs,
        f"{AUTH}/api-key/delete": theirs,
        f"{AUTH}/{{rest}}": {},
        AUTH: {},
    }


def queries(ada: Victim) -> dict[str, str]:
    """The query: another user's id, where a route takes one."""
    return {
        f"{AUTH}/api-key/get": f"?id={ada.key_id}",
        "/api/jobs": f"?cursor={ada.job_id}",
        "/api/usage": f"?user={ada.id}",
        "/api/credits/ledger": f"?user={ada.id}",
        f"{AUTH}/verify-email": f"?token={ada.token}",
    }


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, path) of every route."""
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or ()):
            yield method, str(route.path).replace(":path}", "}")


def test_a_route_unknown_to_this_test_fails_it():
    app = FastAPI(openapi_url=None)
    app.get("/api/new/{thing_id}")(lambda thing_id: None)
    ((method, path),) = [(method, path) for method, path in routes(app) if method == "GET"]
    with pytest.raises(AssertionError, match="thing_id"):
        filled(method, path, Victim(*[""] * 9))
    with pytest.raises(AssertionError, match="POST /api/new"):
        filled("POST", "/api/new", Victim(*[""] * 9))


def filled(method: str, path: str, ada: Victim) -> tuple[str, Any]:
    """The path with another user's ids, and the body. Fails for a route that it does not know."""
    known = parameters(ada) | {"name": NAMES.get(path, ada.file)}
    url = path
    for part in [part.split("}")[0] for part in path.split("{")[1:]]:
        assert part in known, f"{method} {path} is new: say in `parameters` what its {part} is"
        url = url.replace(f"{{{part}}}", known[part])
    sends = method in {"POST", "PUT", "PATCH"}
    assert not sends or path in bodies(ada), f"{method} {path} is new: say in `bodies` what to send"
    return url + queries(ada).get(path, ""), bodies(ada).get(path) if sends else None


async def settle_in(app: InProcessApp) -> Victim:
    person = app.create_user("ada", credits=50)
    token = session_of(app, person.id)
    first = await person.make(PROMPT)
    upload = (await person.client.post("/api/uploads", content=png())).json()["url"]
    running = (await person.make("hold", Prefer="respond-async")).json()["id"]
    with app.store.database.atomic() as db:
        db.execute("UPDATE user SET name = ? WHERE id = ?", [NAME, person.id])
        db.execute("UPDATE apikey SET name = ? WHERE referenceId = ?", [KEY_NAME, person.id])
        ledger.grant(db, person.id, 5, NOTE, NOW)
    key_id = app.rows("SELECT id FROM apikey WHERE referenceId = ?", person.id)[0]["id"]
    file, sent = (url.rpartition("/")[2] for url in (first.json()["imageUrl"], upload))
    job_id = first.headers["X-Job-Id"]
    return Victim(person.id, "ada@example.com", person.key, key_id, token, job_id, running, file, sent)


def png() -> bytes:
    import base64

    return base64.b64decode(picture().partition(",")[2])


def session_of(app: InProcessApp, user_id: str) -> str:
    with app.store.database.atomic() as db:
        return sessions.open_session(db, app.services.auth.secret, user_id, NOW, address="", agent="", remember=True)


def belongings(app: InProcessApp, ada: Victim) -> list[Any]:
    """All rows of one user, but for when their key was last used."""
    owned = {
        "user": "id",
        "session": "userId",
        "account": "userId",
        "job": "user_id",
        "ledger": "user_id",
        "file": "user_id",
    }
    found = [app.rows(f"SELECT * FROM {table} WHERE {column} = ?", ada.id) for table, column in owned.items()]
    return [*found, app.rows("SELECT id, name, enabled, permissions FROM apikey WHERE referenceId = ?", ada.id)]


@app_test(limit_sign_in=False)
async def test_no_route_reaches_data_of_another_user(app: InProcessApp):
    ada = await settle_in(app)
    before = belongings(app, ada)
    called = 0
    for number, (method, path) in enumerate(routes(app.asgi)):
        url, body = filled(method, path, ada)
        bob = app.create_user(f"bob{number}", credits=50)
        for credential in (bob.key, session_of(app, bob.id)):
            answer = await app.client(credential).request(method, url, json=body, headers=ASYNC)
            told = f"{method} {url} as somebody else: {answer.status_code} {answer.text[:300]}"
            assert answer.status_code < 500, told
            if path not in PUBLIC:
                assert not [secret for secret in ada.secrets() if secret in answer.text + str(answer.headers)], told
            if path.startswith("/api/admin/"):
                assert answer.json()["code"] == "SCOPE_REQUIRED", told
            if "job_id" in path and not path.startswith("/api/admin/"):
                assert answer.status_code == 404, told
            called += 1
        assert belongings(app, ada) == before, f"{method} {url} changed something of another's"
    assert called > 100


@app_test(limit_sign_in=False)
async def test_no_route_works_without_a_key_or_a_session(app: InProcessApp):
    ada = await settle_in(app)
    before = belongings(app, ada)
    for method, path in routes(app.asgi):
        url, body = filled(method, path, ada)
        answer = await app.client().request(method, url, json=body, headers=ASYNC)
        told = f"{method} {url} as nobody: {answer.status_code} {answer.text[:300]}"
        if path not in PUBLIC and not path.startswith(AUTH):
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Bearer"), told
        if path not in PUBLIC:
            assert not [secret for secret in ada.secrets() if secret in answer.text + str(answer.headers)], told
        assert belongings(app, ada) == before, told


@app_test()
async def test_the_owner_does_see_the_data(app: InProcessApp):
    """Otherwise the other tests would prove nothing."""
    ada = await settle_in(app)
    person = ApiUser(ada.id, ada.key, app.client(ada.key))
    text = str([await person.read(path) for path in ("/api/jobs", "/api/credits/ledger", "/api/usage")])
    for secret in (PROMPT, KEY_NAME, NOTE, ada.file):
        assert secret in text
    session = (await app.client(ada.token).get(f"{AUTH}/get-session")).text
    assert NAME in session and ada.email in session


def test_no_secret_is_in_any_log(tmp_path: Any, caplog: pytest.LogCaptureFixture):
    kept: list[str] = []

    @app_test(limit_sign_in=False)
    async def walk(app: InProcessApp) -> None:
        ada = await settle_in(app)
        kept.extend([ada.key, ada.token, app.services.auth.secret.text, PASSWORD])
        for method, path in routes(app.asgi):
            url, body = filled(method, path, ada)
            if ada.token in url:
                continue  # a link out of a mail: the server that stands in front may log it, this one does not
            for headers in ({"x-api-key": ada.key}, {"Cookie": f"better-auth.session_token={ada.token}.x"}):
                await app.client().request(method, url, json=body, headers=headers | ASYNC)
        await app.client(ada.key + "x").get("/api/credits")

    with caplog.at_level(logging.DEBUG):
        walk(tmp_path)
    assert caplog.records and not [secret for secret in kept if secret in caplog.text]
