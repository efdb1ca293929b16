"""Origin checks, redirect targets and the rate limit of `/api/auth`."""

import pytest
from starlette.requests import Request

from server import settings
from server.api import origins
from server.api.origins import Origins
from server.auth.errors import AuthError
from server.auth.rate_limit import MAX_ENTRIES, SignInRateLimiter, network_of
from server.errors import InvalidOrigin
from server.settings import Settings

OWN = "https://plantain.example"
ORIGINS = Origins(frozenset({OWN}), ("https://studio.example", "https://*.team.example", "*.any.example:8080"))


def request(method: str = "POST", **headers: str) -> Request:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": method, "headers": sent})


@pytest.mark.parametrize(
    ("origin", "trusted"),
    [
        (OWN, True),
        ("https://studio.example", True),
        ("https://a.team.example", True),
        ("http://x.any.example:8080", True),
        ("https://x.any.example", False),
        ("http://studio.example", False),
        ("https://studio.example.evil.example", False),
        ("https://evil.example/a.team.example", False),
        ("https://evil.example@a.team.example", False),
        ("https://team.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_trust(origin: str, trusted: bool):
    assert ORIGINS.trusts(origin) is trusted


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("/", True),
        ("/reset?next=%2Fa", True),
        (OWN + "/deep", True),
        ("https://studio.example/x", True),
        ("//evil.example", False),
        ("/\\evil.example", False),
        ("/a\\b", False),
        ("/%2fevil.example", False),
        ("/%5Cevil.example", False),
        ("/a\nb", False),
        ("https://evil.example", False),
        ("https://plantain.example@evil.example", False),
        ("https://evil.example\\@plantain.example", False),
        ("javascript:alert(1)", False),
        ("relative", False),
        ("http://[", False),
    ],
)
def test_redirect_targets(url: str, may: bool):
    assert ORIGINS.may_redirect_to(url) is may


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"cookie": "a=b", "origin": OWN}, None),
        ({"cookie": "a=b", "referer": OWN + "/page"}, None),
        ({"cookie": "a=b", "origin": "https://studio.example"}, None),
        ({"cookie": "a=b", "origin": "null", "sec_fetch_site": "same-origin"}, None),
        ({"cookie": "a=b", "origin": "null"}, "MISSING_OR_NULL_ORIGIN"),
        ({"cookie": "a=b"}, "MISSING_OR_NULL_ORIGIN"),
        ({"cookie": "a=b", "origin": "https://evil.example"}, "INVALID_ORIGIN"),
        ({"cookie": "a=b", "referer": "https://evil.example/"}, "INVALID_ORIGIN"),
        ({"origin": "https://evil.example"}, None),
        ({}, None),
    ],
)
def test_calls_of_auth_routes(given: dict[str, str], code: str | None):
    assert refusal(request(**given), signs_in=False) == code
    assert refusal(request("GET", **given), signs_in=False) is None


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, None),
        ({"origin": OWN}, None),
        ({"sec_fetch_mode": "cors"}, "MISSING_OR_NULL_ORIGIN"),
        ({"origin": "https://evil.example"}, "INVALID_ORIGIN"),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, "CROSS_SITE_NAVIGATION_LOGIN_BLOCKED"),
    ],
)
def test_signing_in_is_checked_without_a_cookie_too(given: dict[str, str], code: str | None):
    assert refusal(request(**given), signs_in=True) == code


def refusal(call: Request, *, signs_in: bool) -> str | None:
    try:
        origins.check_auth_call(call, ORIGINS, signs_in=signs_in)
    except AuthError as error:
        assert error.status == 403
        return error.code
    return None


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({}, True),
        ({"origin": OWN}, True),
        ({"origin": "https://a.team.example", "sec_fetch_site": "cross-site"}, True),
        ({"sec_fetch_site": "same-origin", "origin": "null"}, True),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
    ],
)
def test_calls_of_other_routes_with_a_cookie(given: dict[str, str], allowed: bool):
    origins.check_call(request("GET", **given), ORIGINS)
    if allowed:
        return origins.check_call(request(**given), ORIGINS)
    with pytest.raises(InvalidOrigin):
        origins.check_call(request(**given), ORIGINS)
    return None


def test_links_in_mails_never_follow_the_host_header():
    assert settings.address_of(Settings()) == "http://127.0.0.1:8000"
    assert settings.address_of(Settings(host="0.0.0.0", port=80)) == "http://127.0.0.1:80"
    assert settings.address_of(Settings(host="::1")) == "http://[::1]:8000"
    assert settings.address_of(Settings(public_url=OWN + "/")) == OWN


def test_the_codes_of_refused_redirects():
    for name, code in {
        "callbackURL": "INVALID_CALLBACK_URL",
        "redirectTo": "INVALID_REDIRECT_URL",
        "errorCallbackURL": "INVALID_ERROR_CALLBACK_URL",
        "newUserCallbackURL": "INVALID_NEW_USER_CALLBACK_URL",
    }.items():
        with pytest.raises(AuthError) as caught:
            origins.check_redirect("https://evil.example", name, ORIGINS)
        assert (caught.value.status, caught.value.code) == (403, code)


def test_three_attempts_in_ten_seconds():
    sign_in_limiter = SignInRateLimiter()
    assert [sign_in_limiter.retry_after_s("1.2.3.4", "/sign-in/email", now) for now in (0, 1, 2, 3, 9.5)] == [
        0,
        0,
        0,
        7,
        1,
    ]
    assert sign_in_limiter.retry_after_s("1.2.3.5", "/sign-in/email", 3) == 0
    assert sign_in_limiter.retry_after_s("1.2.3.4", "/sign-up/email", 3) == 0
    assert [sign_in_limiter.retry_after_s("1.2.3.4", "/sign-in/email", now) for now in (10, 10.5, 11)] == [0, 1, 0]


def test_other_routes_take_a_hundred_and_mails_three_a_minute():
    sign_in_limiter = SignInRateLimiter()
    assert [sign_in_limiter.retry_after_s("a", "/get-session", 0) for _ in range(101)] == [0] * 100 + [10]
    assert [sign_in_limiter.retry_after_s("a", "/request-password-reset", 0) for _ in range(4)] == [0, 0, 0, 60]


def test_addresses_of_one_network_count_as_one():
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:1.2.3.4") == network_of("1.2.3.4") == "1.2.3.4"
    assert network_of("somewhere") == "somewhere"


def test_memory_is_bounded():
    sign_in_limiter = SignInRateLimiter()
    for number in range(MAX_ENTRIES + 10):
        sign_in_limiter.retry_after_s(str(number), "/ok", 0)
    assert len(sign_in_limiter._calls) == MAX_ENTRIES
