"""Admin routes: usage of all users, the plans and the audit log."""

import json
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server.accounts import admin, usage
from server.accounts.usage import camel
from server.api.dependencies import Admin, Limit, ServicesDep, UsageFormat, UsagePeriod
from server.api.schemas import paginated, usage_response
from server.timestamps import iso

router = APIRouter(prefix="/api/admin")


@router.get("/usage")
async def read_usage(
    _: Admin, services: ServicesDep, period: UsagePeriod, form: UsageFormat = "json", user: str | None = None
) -> Response:
    lines = await services.database.run(usage.read, user, period, services.fal_prices)
    return usage_response(lines, period, form)


@router.get("/plans")
async def list_plans(_: Admin, services: ServicesDep) -> JSONResponse:
    """They are changed in `plans.toml` in the data folder."""
    return JSONResponse({"plans": [camel(asdict(plan)) for plan in services.plans.values()], "nextCursor": None})


@router.get("/audit")
async def list_audit_entries(
    _: Admin, services: ServicesDep, cursor: int | None = None, limit: Limit = 50
) -> JSONResponse:
    rows = await services.database.run(admin.audit_entries, cursor, limit)
    return JSONResponse(paginated("entries", [_audit_json(row) for row in rows], limit))


def _audit_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "actor": row["actor"],
        "actorId": row["actor_id"],
        "actorKeyId": row["actor_key_id"],
        "action": row["act"],
        "subject": row["subject"],
        "detail": json.loads(row["detail"]),
        "createdAt": iso(row["created_at"]),
    }
