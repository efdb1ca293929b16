"""`plantain users import`: from hand-made databases, and from what a real Better Auth server wrote."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.accounts import admin, keys, ledger, users
from server.auth import importer, passwords
from server.auth.credentials import find_by_email
from server.auth.secret import Secret
from server.auth.sessions import of_user
from server.cli.main import app as cli
from server.db.database import Database
from server.errors import BadRequest
from server.jobs.store import JobStore
from server.settings import Settings
from server.timestamps import iso
from tests.support import auth_server
from tests.support.app import serve_app

NOW = 1_790_000_000.0
SECRET = Secret("s" * 40)
TABLES = """
CREATE TABLE user (id text PRIMARY KEY, name text NOT NULL, email text NOT NULL UNIQUE, emailVerified integer NOT NULL,
    image text, createdAt date NOT NULL, updatedAt date NOT NULL, role text, banned integer, banReason text,
    banExpires date);
CREATE TABLE session (id text PRIMARY KEY, expiresAt date NOT NULL, token text NOT NULL UNIQUE,
    createdAt date NOT NULL, updatedAt date NOT NULL, ipAddress text, userAgent text,
    userId text NOT NULL REFERENCES user (id) ON DELETE CASCADE, impersonatedBy text);
CREATE TABLE account (id text PRIMARY KEY, accountId text NOT NULL, providerId text NOT NULL,
    userId text NOT NULL REFERENCES user (id) ON DELETE CASCADE, accessToken text, refreshToken text, idToken text,
    accessTokenExpiresAt date, refreshTokenExpiresAt date, scope text, password text, createdAt date NOT NULL,
    updatedAt date NOT NULL);
CREATE TABLE verification (id text PRIMARY KEY, identifier text NOT NULL, value text NOT NULL, expiresAt date NOT NULL,
    createdAt date NOT NULL, updatedAt date NOT NULL);
CREATE TABLE apikey (id text PRIMARY KEY, configId text NOT NULL, name text, start text, referenceId text NOT NULL,
    prefix text, key text NOT NULL, refillInterval integer, refillAmount integer, lastRefillAt date, enabled integer,
    rateLimitEnabled integer, rateLimitTimeWindow integer, rateLimitMax integer, requestCount integer,
    remaining integer, lastRequest date, expiresAt date, createdAt date NOT NULL, updatedAt date NOT NULL,
    permissions text, metadata text);
"""


class Theirs:
    """A Better Auth database in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = sqlite3.connect(path)
        self.db.executescript(TABLES)

    def add(self, table: str, **row: Any) -> None:
        row = {"createdAt": iso(NOW - 99), "updatedAt": iso(NOW - 99), **row}
        marks = ", ".join("?" * len(row))
        self.db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))
        self.db.commit()

    def add_user(self, name: str, **more: Any) -> None:
        self.add("user", id=name, name=name.title(), email=f"{name}@example.com", emailVerified=1, **more)
        self.add("account", id=f"a-{name}", accountId=name, providerId="credential", userId=name, password="aa:bb")
        self.add("session", id=f"s-{name}", token=f"token-of-{name}", userId=name, expiresAt=iso(NOW + 60))


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Theirs]:
    made = Theirs(tmp_path / "better-auth.sqlite")
    yield made
    made.db.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(Database(tmp_path / "plantain.sqlite"))
    yield opened
    opened.database.close()


def bring(store: JobStore, theirs: Theirs) -> str:
    with store.database.atomic() as db:
        return importer.summary(importer.import_database(db, SECRET, theirs.path, NOW))


def test_users_are_imported_with_all_their_rows_once(store: JobStore, theirs: Theirs):
    theirs.add_user("ada", role="user,admin")
    theirs.add_user("grace")
    theirs.add("apikey", id="k", configId="default", start="bnp_Ab", referenceId="ada", prefix="bnp_", enabled=1,
               key=keys.hash_of("bnp_secret"), permissions='{"plantain":["read"]}', metadata="no json")  # fmt: skip
    assert bring(store, theirs) == "2 users, 2 passwords, 2 sessions, 1 keys, 0 skipped"
    assert bring(store, theirs) == "0 users, 0 passwords, 0 sessions, 0 keys, 2 skipped"
    caller = keys.authenticate(store.db, "bnp_secret", NOW)
    assert (caller.user_id, caller.role, caller.granted) == ("ada", "admin", {"read"})
    assert ledger.balance(store.db, "ada") == 10
    assert (find_by_email(store.db, "ADA@example.com") or {})["password"] == "aa:bb"
    assert [each.token for each in of_user(store.db, SECRET, "grace", NOW)] == ["token-of-grace"]


def test_an_existing_user_is_skipped(store: JobStore, theirs: Theirs):
    own = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    theirs.add_user("ada")
    assert bring(store, theirs) == "0 users, 0 passwords, 0 sessions, 0 keys, 1 skipped"
    assert users.user_by_email(store.db, "ada@example.com") == own
    assert of_user(store.db, SECRET, own, NOW) == []


def test_expired_rows_and_other_sign_in_methods_are_not_imported(store: JobStore, theirs: Theirs):
    theirs.add_user("ada")
    theirs.add("session", id="old", token="old", userId="ada", expiresAt=iso(NOW - 1))
    theirs.add("account", id="g", accountId="7", providerId="google", userId="ada", accessToken="secret")
    theirs.add("apikey", id="k", configId="default", referenceId="ada", key="h", expiresAt=iso(NOW - 1))
    assert bring(store, theirs) == "1 users, 1 passwords, 1 sessions, 0 keys, 0 skipped"


@pytest.mark.parametrize(
    "date", [iso(NOW), int(NOW * 1000), NOW, "2026-09-21T14:13:20Z", "2026-09-21T16:13:20.0+02:00"]
)
def test_dates_come_in_many_forms(store: JobStore, theirs: Theirs, date: Any):
    theirs.add("user", id="ada", name="Ada", email="Ada@Example.com", emailVerified=0, createdAt=date)
    bring(store, theirs)
    row = users.user(store.db, users.user_by_email(store.db, "ada@example.com"))
    assert row["createdAt"] == "2026-09-21T14:13:20.000Z" == iso(NOW)


def test_keys_of_the_plugin_before_1_5(store: JobStore, tmp_path: Path):
    theirs = Theirs(tmp_path / "old.sqlite")
    theirs.db.executescript(
        "ALTER TABLE apikey RENAME COLUMN referenceId TO userId; ALTER TABLE apikey DROP COLUMN configId"
    )
    theirs.add_user("ada")
    theirs.add("apikey", id="k", userId="ada", key=keys.hash_of("bnp_old"))
    assert "1 keys" in bring(store, theirs)
    assert keys.authenticate(store.db, "bnp_old", NOW).user_id == "ada"
    theirs.db.close()


def test_another_database_is_refused(store: JobStore, tmp_path: Path):
    (tmp_path / "text").write_text("not a database, but long enough to look at")
    sqlite3.connect(tmp_path / "other").executescript("CREATE TABLE user (id)")
    for name in ("text", "other"):
        with pytest.raises(BadRequest), store.database.atomic() as db:
            importer.import_database(db, SECRET, tmp_path / name, NOW)


def test_the_command_line(tmp_path: Path, theirs: Theirs):
    theirs.add_user("ada")
    Database(tmp_path / "data" / "plantain.sqlite").close()
    call = ["users", "import", str(theirs.path), "--data", str(tmp_path / "data")]
    first = CliRunner().invoke(cli, call)
    assert (first.exit_code, first.stdout.strip()) == (0, "1 users, 1 passwords, 0 sessions, 0 keys, 0 skipped")
    assert CliRunner().invoke(cli, call).stdout.strip() == "0 users, 0 passwords, 0 sessions, 0 keys, 1 skipped"
    assert CliRunner().invoke(cli, [*call[:2], "nowhere.sqlite", *call[3:]]).exit_code == 2


def test_the_owner_may_be_given_a_password(tmp_path: Path):
    store = JobStore(Database(tmp_path / "plantain.sqlite"))
    admin.create_owner(store.db, NOW)
    call = ["users", "password", "owner@localhost", "--data", str(tmp_path)]
    assert CliRunner().invoke(cli, call, input="short\nshort\n").exit_code == 2
    assert CliRunner().invoke(cli, call, input="long enough\nlong enough\n").exit_code == 0
    row = find_by_email(store.db, "owner@localhost")
    assert row and passwords.check_password(row["password"], "long enough")
    store.database.close()


def test_a_real_servers_users_go_on_as_before(tmp_path: Path, theirs: Theirs, monkeypatch: pytest.MonkeyPatch):
    auth_server.installed()
    ours = passwords.hash_password("made here")
    real = json.loads(auth_server.node_output("dump.mjs", SECRET.text, ours).splitlines()[-1])
    for table, rows in real["tables"].items():
        for row in rows:
            theirs.add(
                table, **{name: json.dumps(each) if isinstance(each, dict) else each for name, each in row.items()}
            )
    assert real["accepts"], "a password hashed here is not one there"
    assert passwords.check_password(real["hash"], "made there")
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET.text)
    asyncio.run(_all_are_let_in(Settings(data=tmp_path / "data"), theirs, real["known"]))


async def _all_are_let_in(settings: Settings, theirs: Theirs, known: list[dict[str, str]]) -> None:
    import time

    async with serve_app(settings, time.time) as app:  # type: ignore[arg-type]
        with app.services.jobs.database.atomic() as db:
            counts = importer.import_database(db, app.services.auth.secret, theirs.path, time.time())
        assert importer.summary(counts) == "2 users, 2 passwords, 2 sessions, 2 keys, 0 skipped"
        for person in known:
            await _is_let_in(app.client(), person)


async def _is_let_in(client: httpx.AsyncClient, person: dict[str, str]) -> None:
    for header in (
        {"cookie": person["cookie"]},
        {"authorization": f"Bearer {person['token']}"},
        {"x-api-key": person["key"]},
    ):
        assert (await client.get("/api/credits", headers=header)).json()["balance"] == 10
    cookie = {"cookie": person["cookie"]}
    assert [each["token"] for each in (await client.get("/api/auth/list-sessions", headers=cookie)).json()] == [
        person["token"]
    ]
    body = {"email": person["email"], "password": person["password"]}
    assert (await client.post("/api/auth/sign-in/email", json=body)).status_code == 200
