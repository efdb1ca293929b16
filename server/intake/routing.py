"""Routing: whether a request runs on a local device or at fal.ai."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from pipelines.catalog.catalog import Model
from pipelines.params import PARAMS
from server.errors import ModelNotInstalled, PlantainError, RemoteUnavailable, UnsupportedWorkflow, invalid_field
from server.model_registry import ModelRegistry
from server.remote.runner import RemoteRunner
from server.settings import Route

Destination = Literal["local", "remote"]


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


@dataclass(frozen=True)
class LocalRun:
    """What runs a model here: the installed variant, demo weights in its place, or the reason why nothing does.

    `demo` is set where the variant's own weights were never installed. With it, `refusal` is ModelNotInstalled.
    """

    variant: Model | None
    demo: Model | None = None
    refusal: PlantainError | None = None


def local_run(model: Model, workflow: str, registry: ModelRegistry, resolution: str | None) -> LocalRun:
    try:
        variant = registry.chosen(model, workflow, resolution)
    except PlantainError as error:
        return LocalRun(None, refusal=error)
    if model.runs_on != "fal" and workflow not in PARAMS:
        text = f"{workflow} does not run on this server, only at fal.ai."
        return LocalRun(variant, refusal=UnsupportedWorkflow(text, workflow=workflow))
    try:
        registry.weights(variant)
    except PlantainError as error:
        return LocalRun(variant, registry.demo(variant), error)
    return LocalRun(variant, registry.demo(variant))


def choose_route(model: Model, workflow: str, route: Route, local: LocalRun, remote: RemoteRunner) -> Destination:
    """Where a request runs; raises the reason if it cannot run there.

    1. `remote-only`: at fal.ai.
    2. `local-only`: here.
    3. `prefer-local`: here if it is installed; else at fal.ai, if there is an endpoint and a key. Without them the
       error says how to install it here, or, for a model that runs at fal.ai only, why fal.ai is not available.

    Where the error would be that it is not installed, it runs here on demo weights if there are any.
    """
    if route == "remote-only":
        return _at_fal(model, workflow, remote)
    if local.refusal is None:
        return "local"
    available = workflow in model.remote and (remote.connected or not can_run_locally(model, workflow))
    if route == "prefer-local" and available:
        return _at_fal(model, workflow, remote)
    if isinstance(local.refusal, ModelNotInstalled) and local.demo:
        return "local"
    raise local.refusal


def may_fall_back(model: Model, workflow: str, route: Route, remote: RemoteRunner) -> bool:
    """Whether a job that no local device can hold, or that ran out of memory in every mode, goes to fal.ai."""
    return route == "prefer-local" and workflow in model.remote and remote.connected


def can_run_locally(model: Model, workflow: str) -> bool:
    """With its weights installed."""
    return bool(model.weights or model.variants) and workflow in PARAMS


def _at_fal(model: Model, workflow: str, remote: RemoteRunner) -> Destination:
    if workflow not in model.remote:
        raise UnsupportedWorkflow(f"fal.ai has no endpoint for {workflow} by {model.name}.", workflow=workflow)
    remote.check()
    return "remote"
