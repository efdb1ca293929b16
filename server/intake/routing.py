"""Whether a call runs here or at fal."""

from typing import Literal, cast, get_args

from pipelines.catalog.catalog import Model
from pipelines.params import PARAMS
from server.errors import ModelNotInstalled, PlantainError, RemoteUnavailable, UnsupportedWorkflow, invalid_field
from server.model_registry import ModelRegistry
from server.remote.runner import RemoteRunner
from server.settings import Route

Destination = Literal["local", "fal"]


def read_route(header: str | None, setting: Route) -> Route:
    """What the caller asks for in `X-Route`, within what the operator allows: `local-only` is a wall.

    Raises InvalidBody for a word that is none, RemoteUnavailable for a way out that is closed.
    """
    asked = (header or setting).strip().lower()
    if asked not in get_args(Route):
        raise invalid_field("X-Route", f"{header!r} is none of {', '.join(get_args(Route))}")
    if setting == "local-only" and asked == "remote-only":
        raise RemoteUnavailable("This server runs everything itself and sends nothing to fal.ai.")
    return setting if setting == "local-only" else cast(Route, asked)


def choose_route(
    model: Model, workflow: str, route: Route, shelf: ModelRegistry, desk: RemoteRunner, resolution: str | None = None
) -> Destination:
    """Where to run it; whatever stands against that place is raised.

    1. `remote-only`: at fal.
    2. `local-only`: here.
    3. `prefer-local`: here if it is installed; else at fal, if there is an endpoint and a key. Without them the error
       says how to have it here, or, for what runs nowhere else, why fal is out of reach.

    Where that error would be that it is not installed here, it runs here on demo weights, if there are any.
    """
    if route == "remote-only":
        return _at_fal(model, workflow, desk)
    trouble = local_refusal(model, workflow, shelf, resolution)
    if trouble is None:
        return "local"
    if (
        route == "prefer-local"
        and workflow in model.remote
        and (desk.connected or not can_run_locally(model, workflow))
    ):
        return _at_fal(model, workflow, desk)
    if isinstance(trouble, ModelNotInstalled) and shelf.demo(shelf.chosen(model, workflow, resolution)):
        return "local"
    raise trouble


def may_fall_back(model: Model, workflow: str, route: Route, desk: RemoteRunner) -> bool:
    """Whether a job that no device here could ever hold, or that ran out of memory in every way, goes to fal."""
    return route == "prefer-local" and workflow in model.remote and desk.connected


def can_run_locally(model: Model, workflow: str) -> bool:
    """With its weights installed."""
    return bool(model.weights or model.variants) and workflow in PARAMS


def local_refusal(model: Model, workflow: str, shelf: ModelRegistry, resolution: str | None) -> PlantainError | None:
    if model.runs_on != "fal" and workflow not in PARAMS:
        return UnsupportedWorkflow(f"{workflow} does not run on this server, only at fal.ai.", workflow=workflow)
    try:
        shelf.weights(shelf.chosen(model, workflow, resolution))
    except PlantainError as error:
        return error
    return None


def _at_fal(model: Model, workflow: str, desk: RemoteRunner) -> Destination:
    if workflow not in model.remote:
        raise UnsupportedWorkflow(f"fal.ai has no endpoint for {workflow} by {model.name}.", workflow=workflow)
    desk.check()
    return "fal"
