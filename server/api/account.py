"""The caller's own credits and usage."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from server import accounts, ledger, usage
from server.api.common import Authenticated, Served
from server.api.usage import Asked, Form, answer
from server.clock import iso

router = APIRouter()

Limit = Annotated[int, Query(ge=1, le=200)]


@router.get("/api/credits")
async def read_credits(caller: Authenticated, served: Served) -> JSONResponse:
    user = await served.store.call(accounts.user, served.store.db, caller.user_id)
    limits = {"requestsAMinute": caller.plan.requests_a_minute, "jobsAtOnce": caller.plan.jobs_at_once}
    return JSONResponse({"balance": user["balance"], "plan": user["plan"], "limits": limits})


@router.get("/api/credits/ledger")
async def list_entries(
    caller: Authenticated, served: Served, cursor: int | None = None, limit: Limit = 50
) -> JSONResponse:
    """Newest first."""
    rows = await served.store.call(ledger.entries, served.store.db, caller.user_id, cursor, limit)
    return JSONResponse(entries_json(rows, limit))


@router.get("/api/usage")
async def read_usage(caller: Authenticated, served: Served, period: Asked, form: Form = "json") -> Response:
    """By day, key, model and place; `format=csv` for a spreadsheet."""
    lines = await served.store.call(usage.read, served.store.db, caller.user_id, period, served.fal_prices)
    return answer(lines, period, form)


def entries_json(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    next_cursor = rows[-1]["id"] if len(rows) == limit else None
    return {"entries": [_entry(row) for row in rows], "nextCursor": next_cursor}


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "kind": row["kind"],
        "amount": row["amount"],
        "balance": row["balance"],
        "jobId": row["job_id"],
        "note": row["note"],
        "createdAt": iso(row["created_at"]),
    }
