"""The caller's own credits."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from server import accounts, ledger
from server.api.common import Authenticated, Served
from server.clock import iso

router = APIRouter()


@router.get("/api/credits")
async def read_credits(caller: Authenticated, served: Served) -> JSONResponse:
    user = await served.store.call(accounts.user, served.store.db, caller.user_id)
    return JSONResponse({"balance": user["balance"], "plan": user["plan"]})


@router.get("/api/credits/ledger")
async def list_entries(
    caller: Authenticated,
    served: Served,
    cursor: int | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JSONResponse:
    """Newest first."""
    rows = await served.store.call(ledger.entries, served.store.db, caller.user_id, cursor, limit)
    next_cursor = rows[-1]["id"] if len(rows) == limit else None
    return JSONResponse({"entries": [_entry(row) for row in rows], "nextCursor": next_cursor})


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
