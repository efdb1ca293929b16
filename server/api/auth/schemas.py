"""Better Auth's JSON: parses and checks bodies, down to upstream's error texts, and serialises rows.

A schema names each field's type: `string`, `email`, `boolean`, `number` or `object`, then `?` if it may be missing and
`|null` if it may be null. Fields beyond the schema are passed on.
"""

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

MAX_BYTES = 256 * 2**10
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
EMAIL = re.compile(r"(?!\.)(?!.*\.\.)[\w'+\-.]*[\w+-]@(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}", re.ASCII)
LOCAL_EMAIL = re.compile(r"[\w+.-]+@localhost", re.ASCII)
"""The address of the owner, who is created at the first start."""
MAX_EMAIL_LENGTH = 320
KEY_COLUMNS = (
    "configId", "name", "start", "referenceId", "prefix", "refillInterval", "refillAmount", "lastRefillAt", "enabled",
    "rateLimitEnabled", "rateLimitTimeWindow", "rateLimitMax", "requestCount", "remaining", "lastRequest", "expiresAt",
    "createdAt", "updatedAt", "permissions", "metadata", "id",
)  # fmt: skip

Schema = Mapping[str, str]


async def read(request: Request, schema: Schema, *, form: bool = False) -> dict[str, Any]:
    """The body, checked against the schema. `form`: an HTML form is accepted too. Raises AuthError or TooLarge."""
    body = await _parsed(request, (FORM, JSON) if form else (JSON,))
    if not isinstance(body, dict):
        if body is None and not schema:
            return {}
        kind = "undefined" if body is None else _type_name(body)
        raise invalid_body(f"[body] Invalid input: expected object, received {kind}")
    problems = [problem for name, kind in schema.items() if (problem := _check_field(name, kind, body))]
    if problems:
        raise invalid_body("; ".join(problems))
    return body


def is_email(text: str) -> bool:
    return len(text) <= MAX_EMAIL_LENGTH and EMAIL.fullmatch(text) is not None


async def _parsed(request: Request, allowed: tuple[str, ...]) -> Any:
    """The body as a value; None without a body or without a content type."""
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
        if len(chunks) > MAX_BYTES:
            raise TooLarge(f"The body is over the limit of {MAX_BYTES // 2**10} KiB.")
    return bytes(chunks)


def _check_field(name: str, kind: str, body: Mapping[str, Any]) -> str | None:
    base = kind.removesuffix("?").removesuffix("|null")
    if name not in body:
        return (
            None
            if kind.endswith("?")
            else f"[body.{name}] Invalid input: expected {_base_type(base)}, received undefined"
        )
    value = body[name]
    if value is None and "|null" in kind:
        return None
    if _type_name(value) != _base_type(base):
        return f"[body.{name}] Invalid input: expected {_base_type(base)}, received {_type_name(value)}"
    if isinstance(value, str) and not _is_text(value):
        return f"[body.{name}] Invalid input: not Unicode text"
    return f"[body.{name}] Invalid email address" if base == "email" and not is_email(value) else None


def _base_type(kind: str) -> str:
    return "string" if kind == "email" else kind


def _type_name(value: object) -> str:
    """The type's name in the messages of upstream's validator."""
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
    """False for a lone surrogate, which JSON can escape and SQLite cannot store."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def user_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A user, with the fields of Better Auth's admin plugin."""
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
    """A key's row. `key` is the key in clear, in the response to its creation only."""
    shown = {name: row[name] for name in KEY_COLUMNS}
    shown |= {name: bool(row[name]) for name in ("enabled", "rateLimitEnabled")}
    shown |= {name: json.loads(row[name]) if row[name] else None for name in ("permissions", "metadata")}
    return shown if key is None else {**shown, "key": key}


def key_session_json(row: Mapping[str, Any], key: str, now: float, lives_s: float) -> dict[str, Any]:
    """The session that /get-session returns for an API key."""
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
