"""Running the server, part three: everyone's jobs and usage, the plans, and what admins did."""

import json
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server.accounts import admin, usage
from server.accounts.usage import camel
from server.api.dependencies import Admin, Asked, Form, Limit, ServicesDep
from server.api.schemas import answer, paginated
from server.timestamps import iso

router = APIRouter(prefix="/api/admin")


@router.get("/usage")
async def read_usage(
    _: Admin, services: ServicesDep, period: Asked, form: Form = "json", user: str | None = None
) -> Response:
    lines = await services.database.run(usage.read, user, period, services.fal_prices)
    return answer(lines, period, form)


@router.get("/plans")
async def list_plans(_: Admin, services: ServicesDep) -> JSONResponse:
    """To change them is to write `plans.toml` in the data folder."""
    return JSONResponse({"plans": [camel(asdict(plan)) for plan in services.plans.values()], "nextCursor": None})


@router.get("/audit")
async def list_audit_entries(
    _: Admin, services: ServicesDep, cursor: int | None = None, limit: Limit = 50
) -> JSONResponse:
    rows = await services.database.run(admin.entries, cursor, limit)
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
