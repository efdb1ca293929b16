"""How users, sessions, accounts and API keys look on the wire."""

import json
from collections.abc import Mapping
from typing import Any

from server.auth.session_rows import Session
from server.clock import iso

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
