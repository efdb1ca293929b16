"""Which models can run here, and what a job of one needs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.base import Component, Weights
from pipelines.catalog.catalog import Catalog, Model, UnknownModel
from pipelines.weights.installed import Installed
from server.errors import ModelNotFound, ModelNotInstalled, RemoteUnavailable, UnsupportedResolution, invalid_field
from server.jobs.job import Origin
from server.scheduling.estimates import PeakEstimates
from server.scheduling.need import Need, component_bytes, need_of, shape_of, with_extra_bytes


@dataclass(frozen=True)
class RunSpec:
    """A model's weights as installed, the bytes that one run takes, and its LoRAs by their ids."""

    weights: Weights
    need: Need
    loras: Mapping[str, Component] = field(default_factory=dict)


class ModelRegistry:
    """The catalogue beside what is installed."""

    def __init__(self, catalog: Catalog, installed: Installed, peaks: PeakEstimates | None = None) -> None:
        self.catalog, self.installed = catalog, installed
        self.peaks = peaks or PeakEstimates("cpu", [])

    def find(self, name: str) -> Model:
        """By id or alias. Raises ModelNotFound, naming the close ones."""
        try:
            return self.catalog.find(name)
        except UnknownModel as unknown:
            hint = f" Did you mean {' or '.join(unknown.close)}?" if unknown.close else " See GET /api/models."
            raise ModelNotFound(f"There is no model {name!r}.{hint}", model=name, close=unknown.close) from None

    def chosen(self, model: Model, workflow: str, resolution: str | None = None) -> Model:
        """The model itself, or the best of its variants that is installed and does this; none is: the least of them.

        Raises UnsupportedResolution if no variant has it.
        """
        if workflow not in model.variants:
            return model
        able = [each for each in model.variants[workflow] if not resolution or resolution in each.resolutions]
        if not able:
            there_is = list(dict.fromkeys(name for each in model.variants[workflow] for name in each.resolutions))
            raise UnsupportedResolution(
                f"{model.name} has no resolution {resolution} for {workflow}; it has {', '.join(there_is)}.",
                resolution=resolution,
                resolutions=there_is,
            )
        return next(filter(self._is_here, able), able[-1])

    def demo(self, model: Model) -> Model | None:
        """What runs in its stead: the model on demo weights, where its own were never installed and there are some."""
        return self.installed.stand_in(model)

    def weights(self, model: Model) -> Weights:
        """Raises ModelNotInstalled, or RemoteUnavailable for a model that runs on fal.ai only."""
        if model.runs_on == "fal":
            raise RemoteUnavailable(
                f"{model.name} runs on fal.ai only, and this server is not connected to it.", model=model.id
            )
        weights = self.installed.weights(model)
        if weights is None:
            raise not_installed(model.stands_for or model.id, model.name)
        return weights

    def runnable(
        self, model_id: str, pixels: int, params: Mapping[str, Any] | None = None, origin: Origin | None = None
    ) -> RunSpec:
        """What a run with `pixels` output pixels (of a video, in a frame) takes. Raises as `find` and `weights` do.

        `origin` is that of the weights that it is, or was, planned with: no others are taken in their place.
        """
        model = self.find(model_id)
        if origin == "demo":
            if model.demo is None:
                raise not_installed(model.id, model.name)
            model = model.demo
        weights = self.weights(model)
        shape = shape_of(params or {}, pixels)
        learned = self.peaks.estimates_for(model.id, model.working, shape)
        loras = self.loras(model, [lora["id"] for lora in (params or {}).get("loras", ())])
        need = need_of(weights, model.working, shape, learned)
        return RunSpec(weights, with_extra_bytes(need, component_bytes(loras.values())) if loras else need, loras)

    def loras(self, model: Model, ids: Iterable[str]) -> dict[str, Component]:
        """Their files. Raises InvalidBody for one that the model has not, ModelNotInstalled for one not here."""
        found = {}
        for id_ in ids:
            if id_ not in model.loras:
                there_are = f"it has {', '.join(model.loras)}" if model.loras else "it has none"
                message = f"{model.name} has no LoRA {id_!r}; {there_are}"
                raise invalid_field("loras", message, loras=list(model.loras))
            found[id_] = self.weights(model.loras[id_]).components[0]
        return found

    def users(self) -> dict[str, list[str]]:
        """The models that use each component, by its key."""
        found: dict[str, list[str]] = defaultdict(list)
        for model in self.catalog.models.values():
            weights = self.installed.weights(self.demo(model) or model)
            for key in {component.key for component in weights.components} if weights else ():
                found[key].append(model.id)
        return found

    def families(self) -> list[str]:
        """Families with weights: those that a worker does well to import ahead of need."""
        here = [model for model in self.catalog.models.values() if self._is_here(model) or self.demo(model)]
        return sorted({model.family for model in here if model.family})

    def on_demo(self) -> list[str]:
        """The models that run on demo weights."""
        return [model.id for model in self.catalog.models.values() if self.installed.status(model) == "demo"]

    def _is_here(self, model: Model) -> bool:
        return self.installed.status(model) == "installed"


def not_installed(model_id: str, name: str) -> ModelNotInstalled:
    install = f"plantain pull {model_id}"
    return ModelNotInstalled(f"{name} is not installed here. To install it: {install}", model=model_id, install=install)
