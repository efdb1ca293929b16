"""Admin routes: authorization, changes to accounts, and the audit log."""

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.accounts import keys
from server.cli.main import app as cli
from server.db.database import Database
from server.errors import KeyDisabled
from server.jobs.store import JobStore
from tests.support.app import NOW, ApiUser, InProcessApp, app_test


async def send(who: ApiUser, method: str, path: str, body: Any = None) -> Any:
    answer = await who.call(method, f"/api/admin{path}", body)
    assert answer.is_success, answer.text
    return answer.json()


async def audit_log(app: InProcessApp) -> list[tuple[str, str, str]]:
    found = (await app.owner().read("/api/admin/audit"))["entries"]
    return [(entry["actor"], entry["action"], entry["subject"]) for entry in found]


@app_test()
async def test_only_admins_may_use_admin_routes(app: InProcessApp):
    ada, owner = app.create_user(), app.owner()
    assert (await ada.call("GET", "/api/admin/users")).json()["code"] == "SCOPE_REQUIRED"
    narrow = app.add_key(owner.id, scopes=["generate", "read"])
    assert (await narrow.call("GET", "/api/admin/users")).status_code == 403
    trusted = app.add_key(ada.id, scopes=["admin"])
    assert (await trusted.call("GET", "/api/admin/users")).status_code == 200
    assert (await trusted.make()).json()["code"] == "SCOPE_REQUIRED"
    assert (await owner.call("GET", "/api/admin/users")).status_code == 200


@app_test()
async def test_a_read_key_cannot_change_anything(app: InProcessApp):
    looker = app.add_key(app.create_user().id, scopes=["read"])
    assert await looker.balance() == 10
    refused = await looker.make()
    assert refused.status_code == 403
    assert refused.json()["scope"] == "generate" and refused.json()["scopes"] == ["read"]


@app_test()
async def test_users_are_created_found_and_changed(app: InProcessApp):
    owner = app.owner()
    made = await send(owner, "POST", "/users", {"email": "Bob@Example.com", "plan": "basic"})
    assert (made["email"], made["plan"], made["balance"], made["banned"]) == ("bob@example.com", "basic", 10, False)
    path = f"/users/{made['id']}"
    changed = await send(owner, "PATCH", path, {"plan": "pro", "name": "Bob"})
    assert (changed["plan"], changed["name"], changed["role"]) == ("pro", "Bob", "user")
    assert await send(owner, "GET", path) == changed
    assert [user["email"] for user in (await send(owner, "GET", "/users?search=BOB"))["users"]] == ["bob@example.com"]
    page = await send(owner, "GET", "/users?limit=1")
    rest = await send(owner, "GET", f"/users?limit=1&cursor={page['nextCursor']}")
    assert [user["email"] for user in page["users"] + rest["users"]] == ["bob@example.com", "owner@localhost"]
    assert await audit_log(app) == [
        ("owner@localhost", "users.change", made["id"]),
        ("owner@localhost", "users.create", made["id"]),
    ]


@app_test()
async def test_invalid_changes_are_refused_and_not_audited(app: InProcessApp):
    owner, ada = app.owner(), app.create_user()
    refusals = [
        ("POST", "/users", {"email": "ada@example.com"}, "CONFLICT"),
        ("POST", "/users", {"email": "x@example.com", "plan": "gold"}, "VALIDATION_ERROR"),
        ("POST", "/users", {"email": "nobody"}, "VALIDATION_ERROR"),
        ("PATCH", f"/users/{ada.id}", {"plan": "gold"}, "VALIDATION_ERROR"),
        ("PATCH", f"/users/{ada.id}", {"balance": 5}, "VALIDATION_ERROR"),
        ("PATCH", "/users/nobody", {"name": "x"}, "NOT_FOUND"),
        ("PATCH", f"/users/{owner.id}", {"role": "user"}, "CONFLICT"),
        ("POST", f"/users/{owner.id}/ban", {}, "CONFLICT"),
        ("POST", f"/users/{ada.id}/grants", {"amount": -11}, "INSUFFICIENT_CREDITS"),
        ("POST", "/users/nobody/grants", {"amount": 1}, "NOT_FOUND"),
        ("DELETE", "/keys/nothing", None, "NOT_FOUND"),
        ("PATCH", "/keys/nothing", {"name": "x"}, "NOT_FOUND"),
        ("POST", "/keys", {"userId": "nobody"}, "NOT_FOUND"),
        ("POST", "/jobs/nothing/cancel", None, "NOT_FOUND"),
        ("GET", "/usage?from=2026-02-01&to=2026-01-01", None, "VALIDATION_ERROR"),
    ]
    for method, path, body, code in refusals:
        answer = await owner.call(method, f"/api/admin{path}", body)
        assert answer.json()["code"] == code, (method, path, answer.text)
    assert await audit_log(app) == []
    assert await send(owner, "GET", f"/users/{owner.id}") == await send(owner, "GET", f"/users/{owner.id}")
    assert (await send(owner, "GET", f"/users/{owner.id}"))["role"] == "admin"


@app_test()
async def test_grants_show_in_the_ledger(app: InProcessApp):
    owner, ada = app.owner(), app.create_user()
    assert await send(owner, "POST", f"/users/{ada.id}/grants", {"amount": 25, "note": "thanks"}) == {"balance": 35}
    assert await send(owner, "POST", f"/users/{ada.id}/grants", {"amount": -5}) == {"balance": 30}
    entries = (await send(owner, "GET", f"/users/{ada.id}/ledger"))["entries"]
    assert [(entry["amount"], entry["balance"], entry["note"]) for entry in entries] == [
        (-5, 30, "granted"),
        (25, 35, "thanks"),
        (10, 10, "sign-up"),
    ]
    assert entries == (await ada.read("/api/credits/ledger"))["entries"]


@app_test()
async def test_a_ban_applies_at_once_and_expires(app: InProcessApp):
    owner, ada = app.owner(), app.create_user()
    banned = await send(owner, "POST", f"/users/{ada.id}/ban", {"reason": "spam", "expiresAt": "2026-09-21T15:00:00Z"})
    assert (banned["banned"], banned["banReason"], banned["banExpires"]) == (True, "spam", "2026-09-21T15:00:00.000Z")
    refused = await ada.call("GET", "/api/credits")
    assert (refused.status_code, refused.json()["code"]) == (403, "USER_BANNED")
    assert "spam" in refused.json()["error"]
    assert (await ada.make()).status_code == 403
    app.clock.now = NOW + 86_400
    assert (await ada.make()).status_code == 200, "the ban ended"
    app.clock.now = NOW
    await send(owner, "DELETE", f"/users/{ada.id}/ban")
    assert (await ada.make()).status_code == 200
    assert [act for _, act, _ in await audit_log(app)] == ["users.unban", "users.ban"]


@app_test()
async def test_keys_are_created_narrowed_and_revoked(app: InProcessApp):
    owner, ada = app.owner(), app.create_user()
    order = {"userId": ada.id, "name": "camera", "scopes": ["read", "generate"], "perMinute": 2}
    made = await send(owner, "POST", "/keys", {**order, "expiresAt": "2027-01-01T00:00:00Z"})
    assert made["key"].startswith("bnp_") and made["start"] == made["key"][:6]
    assert made["scopes"] == ["generate", "read"] and made["perMinute"] == 2
    assert made["expiresAt"] == "2027-01-01T00:00:00.000Z"
    camera = ApiUser(ada.id, made["key"], app.client(made["key"]))
    assert (await camera.make()).status_code == 200
    changed = await send(owner, "PATCH", f"/keys/{made['id']}", {"scopes": ["read"], "perMinute": None})
    assert (changed["scopes"], changed["perMinute"], changed["name"]) == (["read"], None, "camera")
    assert (await camera.make()).json()["code"] == "SCOPE_REQUIRED"
    listed = (await send(owner, "GET", f"/keys?user={ada.id}"))["keys"]
    assert {key["id"] for key in listed} > {made["id"]} and not any("key" in key for key in listed)
    assert {key["userId"] for key in listed} == {ada.id}
    assert (await send(owner, "DELETE", f"/keys/{made['id']}"))["enabled"] is False
    assert (await camera.call("GET", "/api/credits")).json()["code"] == "KEY_DISABLED"
    assert [act for _, act, _ in await audit_log(app)] == ["keys.revoke", "keys.change", "keys.create"]
    assert made["key"] not in str(app.rows("SELECT * FROM audit"))


@app_test()
async def test_an_expired_key_and_its_last_use(app: InProcessApp):
    ada = app.create_user()
    short = app.add_key(ada.id, expires_at=NOW + 60)
    assert await short.balance() == 10
    app.clock.now = NOW + 60
    assert (await short.call("GET", "/api/credits")).json()["code"] == "KEY_EXPIRED"
    keys = (await app.owner().read(f"/api/admin/keys?user={ada.id}"))["keys"]
    assert [key["lastUsedAt"] for key in keys] == [None, "2026-09-21T14:13:20.000Z"]


@app_test()
async def test_admins_list_and_cancel_the_jobs_of_all_users(app: InProcessApp):
    owner, ada = app.owner(), app.create_user()
    running = (await ada.make("hold", Prefer="respond-async")).json()
    await ada.make("work", Prefer="respond-async")
    await app.settle()
    jobs = (await send(owner, "GET", "/jobs"))["jobs"]
    assert [(job["userId"], job["params"]["prompt"]) for job in jobs] == [(ada.id, "work"), (ada.id, "hold")]
    queued = (await send(owner, "GET", f"/jobs?status=queued&user={ada.id}"))["jobs"]
    assert [job["id"] for job in queued] == [jobs[0]["id"]]
    cancelled = await send(owner, "POST", f"/jobs/{queued[0]['id']}/cancel")
    assert cancelled["status"] == "cancelled"
    await send(owner, "POST", f"/jobs/{running['id']}/cancel")
    await app.settle()
    assert (await send(owner, "GET", f"/jobs/{running['id']}"))["status"] == "cancelled"
    assert await ada.balance() == 10
    assert (await send(owner, "GET", f"/jobs?user={owner.id}"))["jobs"] == []
    assert [act for _, act, _ in await audit_log(app)] == ["jobs.cancel"] * 2


@app_test()
async def test_the_plans_are_listed(app: InProcessApp):
    plans = (await app.owner().read("/api/admin/plans"))["plans"]
    assert plans[0] == {"name": "free", "requestsAMinute": 5, "jobsAtOnce": 1, "weight": 1}
    assert [plan["name"] for plan in plans] == ["free", "basic", "standard", "pro", "studio"]


@app_test()
async def test_ledger_and_audit_log_only_grow(app: InProcessApp):
    await send(app.owner(), "POST", f"/users/{app.create_user().id}/grants", {"amount": 1})
    for sql in (
        "UPDATE ledger SET amount = 9",
        "DELETE FROM ledger",
        "UPDATE audit SET act = 'x'",
        "DELETE FROM audit",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            app.db.execute(sql)


@app_test()
async def test_an_action_that_cannot_be_audited_is_rolled_back(app: InProcessApp):
    ada = app.create_user()
    app.db.execute("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")
    with pytest.raises(sqlite3.IntegrityError):
        await app.owner().call("POST", f"/api/admin/users/{ada.id}/grants", {"amount": 5})
    assert await ada.balance() == 10


# The same at the command line


def test_the_command_line_acts_and_is_audited(tmp_path: Path):
    def run(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli, [*words, "--data", str(tmp_path)])
        assert result.exit_code == code, result.output
        return result.output.strip()

    Database(tmp_path / "plantain.sqlite").close()
    bob = ("--user", "bob@example.com")
    first = run("users", "create", "Bob@example.com", "--plan", "basic")
    assert first.startswith("bnp_")
    narrow = run("keys", "create", *bob, "--scope", "read", "--per-minute", "3", "--days", "1")
    assert "no scope" in run("keys", "create", *bob, "--scope", "write", code=1)
    assert run("credits", "grant", "5", *bob) == "15"
    run("users", "change", "bob@example.com", "--plan", "pro", "--role", "admin")
    assert "gold" in run("users", "change", "bob@example.com", "--plan", "gold", code=1)
    assert "last admin" in run("users", "ban", "bob@example.com", code=1)
    run("users", "create", "eve@example.com", "--role", "admin")
    run("users", "ban", "bob@example.com", "--reason", "spam")
    run("users", "unban", "bob@example.com")
    for words in (
        ("users", "list"),
        ("keys", "list"),
        ("credits", "ledger"),
        ("plans",),
        ("usage",),
        ("usage", "--csv"),
    ):
        run(*words, *(bob if words[0] == "credits" else ()))
    store = JobStore(Database(tmp_path / "plantain.sqlite"))
    acts = [row["act"] for row in store.db.query("SELECT act FROM audit ORDER BY id")]
    assert acts[:5] == ["users.create", "keys.create", "keys.create", "credits.grant", "users.change"]
    assert acts[-2:] == ["users.ban", "users.unban"] and len(acts) == 9
    caller = keys.authenticate(store.db, narrow, time.time())
    assert caller.granted == {"read"} and caller.role == "admin"
    run("keys", "revoke", caller.key_id or "")
    with pytest.raises(KeyDisabled):
        keys.authenticate(store.db, narrow, time.time())
    store.database.close()
