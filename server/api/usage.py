"""How usage is asked for and told: the days, JSON or CSV."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal

from fastapi import Depends, Query
from fastapi.responses import JSONResponse, Response

from server import usage
from server.api.common import Served
from server.errors import InvalidBody
from server.usage import Period, Usage

DAYS = 30
LONGEST_DAYS = 366

Form = Annotated[Literal["json", "csv"], Query(alias="format")]


async def asked_period(
    served: Served,
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
) -> Period:
    """`from` and `to`, days in UTC and both included; by default the last thirty. Raises InvalidBody."""
    last = last or datetime.fromtimestamp(served.clock(), UTC).date()
    first = first or last - timedelta(days=DAYS - 1)
    if not timedelta(0) <= last - first < timedelta(days=LONGEST_DAYS):
        issue = {"path": "from", "message": f"from one day to {LONGEST_DAYS} days"}
        raise InvalidBody(f"from, to: {issue['message']}", issues=[issue])
    return Period(first, last)


Asked = Annotated[Period, Depends(asked_period)]


def answer(lines: Sequence[Usage], period: Period, form: str) -> Response:
    if form == "csv":
        name = f"usage-{period.first}-{period.last}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(usage.as_csv(lines), media_type="text/csv", headers=headers)
    return JSONResponse(
        {
            "usage": usage.as_json(lines),
            "totals": usage.totals(lines),
            "from": str(period.first),
            "to": str(period.last),
            "nextCursor": None,
        }
    )
