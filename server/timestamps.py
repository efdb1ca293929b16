"""Instants: seconds since 1970 inside, ISO 8601 with exactly three fraction digits and `Z` outside."""

from datetime import UTC, datetime


def iso(instant: float) -> str:
    """Three digits, for JavaScript clients that read more of them as thousands of milliseconds."""
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_or_none(instant: float | None) -> str | None:
    return None if instant is None else iso(instant)


def instant(text: str) -> float:
    """The other way. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
