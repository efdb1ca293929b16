from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.base import ComponentStatus
from server.dispatch.worker_state import PrefetchState
from server.timestamps import iso


def attempt_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "jobId": row["job_id"],
        "model": row["model"],
        "way": row["way"],
        "nextDevice": row["next_device"],
        "nextWay": row["next_way"],
        "at": iso(row["failed_at"]),
    }


def prefetch_json(preparation: PrefetchState) -> dict[str, Any]:
    """What the device brings for a waiting job, or has brought last."""
    return {
        "jobId": preparation.job_id,
        "ended": preparation.ended,
        "failure": preparation.failure or None,
        "components": [
            {"key": key, "name": name, "bytes": size, "to": to} for key, name, size, to in preparation.components
        ],
    }


def component_json(held: ComponentStatus) -> dict[str, Any]:
    return {
        "key": held.key,
        "name": held.name,
        "bytes": held.device_bytes,
        "hostBytes": held.host_bytes,
        "pageLocked": held.page_locked,
        "streamed": held.streamed,
        "since": iso(held.since_at),
    }


def with_models(state: dict[str, Any], models: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The state with the models that use each component, by its key."""
    components = [{**each, "models": list(models.get(each["key"], ()))} for each in state["components"]]
    return {**state, "components": components}
