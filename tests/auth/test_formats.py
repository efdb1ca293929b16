"""Better Auth's formats, against values that a real server wrote: cookies, signatures, passwords; and the secret."""

import asyncio
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from server.api.auth.cookies import Cookies, first_cookie
from server.auth import secret
from server.auth.passwords import Passwords, check_password, hash_password, length_of
from server.auth.secret import Secret

TOKEN = "CTj6gQItVWxH7knmIFac6E1sykThhOIb"
SIGNED = TOKEN + ".OIB8+33Ao69i1A0SLmVtwmNZ6VB3xDhoQ5riYL1lEQs="
ENCODED = TOKEN + ".OIB8%2B33Ao69i1A0SLmVtwmNZ6VB3xDhoQ5riYL1lEQs%3D"
SECRET = Secret("x" * 40)
HASH = (
    "ddf534243f52ed624ed2d524f80b13f5:9e1d4c1497f97f76432ca900266342e93de5428df8a096b9df89145f467981e9"
    "c72747e48274955aed8c2000c330a102f5fc145999bcb22017ed439ee031662e"
)


def request(*cookies: str) -> Request:
    return Request({"type": "http", "headers": [(b"cookie", cookie.encode()) for cookie in cookies]})


def test_signatures_are_the_real_ones():
    assert SECRET.sign(TOKEN) == SIGNED
    assert SECRET.unsign(SIGNED) == SECRET.unsign(ENCODED) == TOKEN


@pytest.mark.parametrize(
    "garbage",
    ["", ".", TOKEN, f"{TOKEN}.", SIGNED[:-1], SIGNED[:-2] + "x=", "D" + SIGNED[1:], "%zz", "%ff%fe.x", "é" * 44],
)
def test_what_was_not_signed_here_is_nothing(garbage: str):
    assert SECRET.unsign(garbage) is None
    assert Secret("y" * 40).unsign(SIGNED) is None


@given(st.text())
def test_nothing_that_is_not_a_signature_passes_or_breaks(text: str):
    assert SECRET.unsign(text) is None
    assert SECRET.unsign(f"{text}.{'A' * 43}=") is None


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_what_is_signed_is_read_back(value: str):
    if "%" not in value:
        assert SECRET.unsign(SECRET.sign(value)) == value


def test_cookies_are_set_as_on_the_real_thing():
    plain, tls = Cookies(SECRET, secure=False), Cookies(SECRET, secure=True)
    name = "better-auth.session_token"
    assert plain.set(TOKEN) == [f"{name}={ENCODED}; Max-Age=604800; Path=/; HttpOnly; SameSite=Lax"]
    assert tls.set(TOKEN) == [f"__Secure-{name}={ENCODED}; Max-Age=604800; Path=/; HttpOnly; Secure; SameSite=Lax"]
    short = plain.set(TOKEN, remember=False)
    assert short[0] == f"{name}={ENCODED}; Path=/; HttpOnly; SameSite=Lax"
    assert short[1].startswith("better-auth.dont_remember=true.") and "Max-Age" not in short[1]
    assert plain.clear() == [
        f"better-auth.{each}=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"
        for each in ("session_token", "session_data", "dont_remember")
    ]


def test_the_first_cookie_of_a_name_counts():
    cookies = Cookies(SECRET, secure=False)
    assert cookies.token(request(f"a=b; better-auth.session_token={ENCODED}; better-auth.session_token=x")) == TOKEN
    assert cookies.token(request("a=b", f"better-auth.session_token={SIGNED}")) == TOKEN
    assert cookies.token(request(f"better-auth.session_token=x; better-auth.session_token={ENCODED}")) is None
    assert cookies.token(request(f"__Secure-better-auth.session_token={ENCODED}")) is None
    assert first_cookie(["a=1; b = 2;c=3=4"], "c") == "3=4"


def test_passwords_hashed_there_open_here():
    assert check_password(HASH, "Pässwörd ﬁ 🍌")
    assert check_password(HASH, "Pässwörd fi 🍌"), "NFKC makes them one"
    assert not check_password(HASH, "Password fi 🍌")


def test_hashes_are_salted_and_of_the_same_shape():
    one, two = hash_password("a"), hash_password("a")
    assert one != two and len(one) == len(HASH) and check_password(one, "a")


@pytest.mark.parametrize("stored", ["", ":", "salt", "salt:zz", "é:é"])
def test_what_is_no_hash_matches_nothing(stored: str):
    assert not check_password(stored, "")


def test_nobodys_password_takes_the_same_work_and_never_matches(monkeypatch: pytest.MonkeyPatch):
    from server.auth import passwords

    worked: list[str] = []
    real = passwords._scrypt
    monkeypatch.setattr(passwords, "_scrypt", lambda text, salt: worked.append(text) or real(text, salt))

    async def tell() -> None:
        checker = Passwords(threads=1)
        assert not await checker.matches(None, "guess")
        assert await checker.matches(HASH, "Pässwörd fi 🍌")
        checker.close()

    asyncio.run(tell())
    assert worked == ["guess", "Pässwörd fi 🍌"]


def test_length_counts_as_javascript_does():
    assert (length_of("abc"), length_of("é"), length_of("🍌")) == (3, 1, 2)


@given(st.text(st.characters(codec="utf-8")), st.text(min_size=1))
def test_a_sealed_token_opens_with_the_secret_only(token: str, session_id: str):
    session = session_id.encode("utf-8", "replace").decode()
    assert SECRET.unseal(SECRET.seal(token, session), session) == token
    if len(token) > 8:
        assert SECRET.seal(token, session) != Secret("y" * 40).seal(token, session)
        assert SECRET.seal(token, session) != SECRET.seal(token, session + "x")


def test_the_secret_is_kept_for_its_owner_alone(tmp_path: Path):
    made = secret.load(tmp_path, {})
    assert secret.load(tmp_path, {}) == made and len(made.text) >= 32
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert made.text not in repr(made)


@pytest.mark.parametrize("name", ["PLANTAIN_SECRET", "BETTER_AUTH_SECRET"])
def test_a_secret_may_be_brought_along(tmp_path: Path, name: str):
    assert secret.load(tmp_path, {name: "s" * 32}).text == "s" * 32
    assert list(tmp_path.iterdir()) == []
