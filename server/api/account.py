"""The caller's own credits and usage."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server.accounts import ledger, usage, users
from server.api.dependencies import CurrentCaller, Limit, ServicesDep, UsageFormat, UsagePeriod
from server.api.schemas import entries_json, usage_response

router = APIRouter()


@router.get("/api/credits")
async def read_credits(caller: CurrentCaller, services: ServicesDep) -> JSONResponse:
    user = await services.database.run(users.user, caller.user_id)
    limits = {"requestsAMinute": caller.plan.requests_a_minute, "jobsAtOnce": caller.plan.jobs_at_once}
    return JSONResponse({"balance": user["balance"], "plan": user["plan"], "limits": limits})


@router.get("/api/credits/ledger")
async def list_entries(
    caller: CurrentCaller, services: ServicesDep, cursor: int | None = None, limit: Limit = 50
) -> JSONResponse:
    """Newest first."""
    rows = await services.database.run(ledger.entries, caller.user_id, cursor, limit)
    return JSONResponse(entries_json(rows, limit))


@router.get("/api/usage")
async def read_usage(
    caller: CurrentCaller, services: ServicesDep, period: UsagePeriod, form: UsageFormat = "json"
) -> Response:
    """By day, key, model and where jobs ran; `format=csv` for a spreadsheet."""
    lines = await services.database.run(usage.read, caller.user_id, period, services.fal_prices)
    return usage_response(lines, period, form)
