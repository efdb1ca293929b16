"""How users, sessions, accounts and API keys look on the wire."""
# FROM server.auth.bodies: Reads bodies as Better Auth does, down to the texts of what is wrong with them.  A schema names each field's kind: `string`, `email`, `boolean`, `number` or `object`, with `?` where it may be left out and `|null` where it may be null. Fields beyond the schema are passed on.

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from starlette.requests import Request

from server.auth.errors import AuthError, invalid_body
from server.auth.sessions import Session
from server.errors import TooLarge
from server.timestamps import iso

MOST_BYTES = 256 * 2**10
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
EMAIL = re.compile(r"(?!\.)(?!.*\.\.)[\w'+\-.]*[\w+-]@(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}", re.ASCII)
LOCAL_EMAIL = re.compile(r"[\w+.-]+@localhost", re.ASCII)
"""The owner's, whom the first start makes."""
LONGEST_EMAIL = 320

Schema = Mapping[str, str]


async def read(request: Request, schema: Schema, *, form: bool = False) -> dict[str, Any]:
    """The body, checked. Raises AuthError. `form`: the page's own form may be sent as well."""
    body = await _parsed(request, (FORM, JSON) if form else (JSON,))
    if not isinstance(body, dict):
        if body is None and not schema:
            return {}
        kind = "undefined" if body is None else _kind(body)
        raise invalid_body(f"[body] Invalid input: expected object, received {kind}")
    problems = [problem for name, kind in schema.items() if (problem := _problem(name, kind, body))]
    if problems:
        raise invalid_body("; ".join(problems))
    return body


def is_email(text: str) -> bool:
    return len(text) <= LONGEST_EMAIL and EMAIL.fullmatch(text) is not None


async def _parsed(request: Request, allowed: tuple[str, ...]) -> Any:
    """None where there is none: a body without a content type counts as none."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = await _bytes(request)
    if not content_type or not raw:
        return None
    if content_type not in allowed:
        text = f'Content-Type "{content_type}" is not allowed. Allowed types: {", ".join(allowed)}'
        raise AuthError(415, "UNSUPPORTED_MEDIA_TYPE", text)
    try:
        text = raw.decode()
        return dict(parse_qsl(text)) if content_type == FORM else json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise AuthError(400, "BAD_REQUEST", "Invalid JSON in request body") from None


async def _bytes(request: Request) -> bytes:
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > MOST_BYTES:
            raise TooLarge(f"The body is over the limit of {MOST_BYTES // 2**10} KiB.")
    return bytes(chunks)


def _problem(name: str, kind: str, body: Mapping[str, Any]) -> str | None:
    base = kind.removesuffix("?").removesuffix("|null")
    if name not in body:
        return (
            None if kind.endswith("?") else f"[body.{name}] Invalid input: expected {_type(base)}, received undefined"
        )
    value = body[name]
    if value is None and "|null" in kind:
        return None
    if _kind(value) != _type(base):
        return f"[body.{name}] Invalid input: expected {_type(base)}, received {_kind(value)}"
    if isinstance(value, str) and not _is_text(value):
        return f"[body.{name}] Invalid input: not Unicode text"
    return f"[body.{name}] Invalid email address" if base == "email" and not is_email(value) else None


def _type(kind: str) -> str:
    return "string" if kind == "email" else kind


def _kind(value: object) -> str:
    """The type's name as JavaScript's validator tells it."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _is_text(value: str) -> bool:
    """JSON may spell half a surrogate pair, which no database takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


KEY_COLUMNS = (
    "configId", "name", "start", "referenceId", "prefix", "refillInterval", "refillAmount", "lastRefillAt", "enabled",
    "rateLimitEnabled", "rateLimitTimeWindow", "rateLimitMax", "requestCount", "remaining", "lastRequest", "expiresAt",
    "createdAt", "updatedAt", "permissions", "metadata", "id",
)  # fmt: skip


def user_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """With what Better Auth's admin plugin adds."""
    return {
        "name": row["name"],
        "email": row["email"],
        "emailVerified": bool(row["emailVerified"]),
        "image": row["image"],
        "createdAt": row["createdAt"],
        "updatedAt": row["updatedAt"],
        "role": row["role"],
        "banned": bool(row["banned"]),
        "banReason": row["banReason"],
        "banExpires": row["banExpires"],
        "id": row["id"],
    }


def session_json(session: Session) -> dict[str, Any]:
    return {
        "expiresAt": iso(session.expires_at),
        "token": session.token,
        "createdAt": iso(session.created_at),
        "updatedAt": iso(session.updated_at),
        "ipAddress": session.address,
        "userAgent": session.agent,
        "userId": session.user_id,
        "id": session.id,
    }


def account_json(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("accountId", "providerId", "userId", "createdAt", "updatedAt", "id")
    scopes = [scope for scope in (row["scope"] or "").split(",") if scope]
    return {**{name: row[name] for name in names}, "scopes": scopes}


def key_json(row: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """`key` in clear, in the answer to its creation only."""
    shown = {name: row[name] for name in KEY_COLUMNS}
    shown |= {name: bool(row[name]) for name in ("enabled", "rateLimitEnabled")}
    shown |= {name: json.loads(row[name]) if row[name] else None for name in ("permissions", "metadata")}
    return shown if key is None else {**shown, "key": key}


def key_session_json(row: Mapping[str, Any], key: str, now: float, lives_s: float) -> dict[str, Any]:
    """What /get-session tells whoever comes with an API key in place of a session."""
    return {
        "id": row["id"],
        "token": key,
        "userId": row["referenceId"],
        "userAgent": None,
        "ipAddress": None,
        "createdAt": iso(now),
        "updatedAt": iso(now),
        "expiresAt": row["expiresAt"] or iso(now + lives_s),
    }
