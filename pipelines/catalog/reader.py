"""Reads `weights.toml` into the catalogue, refusing whatever it does not understand."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pipelines.catalog.catalog import (
    WEIGHTS_TOML,
    Catalog,
    Credits,
    Dtype,
    Kind,
    Model,
    Quantisation,
    Retired,
    Source,
    name_index,
)
from pipelines.catalog.endpoints import read_endpoints
from pipelines.catalog.sections import read_all_sizes, read_frames, read_lora, read_source, read_working
from pipelines.catalog.table import CatalogError, Table
from pipelines.params import Workflow

TUNABLE: Mapping[str, type] = {
    "num_inference_steps": int, "guidance_scale": float, "strength": float, "negative_prompt": str,
    "duration": float, "fps": int, "resolution": str,
}  # fmt: skip
"""What `defaults` may hold. A caller may set one of these exactly if the model's `defaults` has it."""

FAMILY_KEYS = ("defaults", "dtype", "dtypes", "frames", "size_multiple", "sizes", "working")
"""What `[families.NAME]` may hold; a model's own table overrides it, `defaults` one by one."""

ONE_GGUF = re.compile(r"[^*?\[\]]+\.gguf")

DEMO_KEYS = ("architecture", "defaults", "dtype", "frames", "path", "size_multiple", "sizes", "working")
"""What `[demo.FAMILY]` may hold, and a model's own `demo`, which overrides it."""


def load_catalog(path: Path = WEIGHTS_TOML) -> Catalog:
    """Raises `CatalogError`, with the path in front, at the first thing that is wrong."""
    try:
        return read_top(Table("top level", tomllib.loads(path.read_text("utf-8"))), path.parent.absolute())
    except (OSError, tomllib.TOMLDecodeError, CatalogError) as error:
        raise CatalogError(f"{path}: {error}") from error


def read_top(top: Table, folder: Path) -> Catalog:
    families = {name: read_part(table, FAMILY_KEYS) for name, table in top.tables("families").items()}
    demos = {name: read_part(table, DEMO_KEYS) for name, table in top.tables("demo").items()}
    tables = top.tables("models")
    variants = {name: table.mapping("variants", list) for name, table in tables.items()}
    bases = {name: table.take("base", str, "") for name, table in tables.items()}
    own_demos = {name: read_part(table.table("demo"), DEMO_KEYS) for name, table in tables.items()}
    models = {name: read_model(name, table, families, bool(variants[name])) for name, table in tables.items()}
    models = {name: replace(model, demo=read_demo(model, demos, own_demos[name], folder))
              for name, model in models.items()}  # fmt: skip
    for family in demos.keys() - {model.family for model in models.values() if model.demo}:
        raise CatalogError(f"[demo.{family}]: no model with weights is of this family")
    models |= {name: replace(models[name], variants=find_variants(name, table, models))
               for name, table in variants.items() if table}  # fmt: skip
    models |= {name: with_base(models[name], base, models) for name, base in bases.items()}
    catalog = Catalog(models, top.mapping("default_models", str), top.words("starter"), read_endpoints(top))
    top.done()
    name_index(models.values())
    check_references(catalog)
    return catalog


def check_references(catalog: Catalog) -> None:
    for kind, name in catalog.default_models.items():
        if name not in catalog.models or catalog.models[name].kind != kind:
            raise CatalogError(f"[default_models]: {kind} = {name!r} is not the id of a model of that kind")
    for name in catalog.starter:
        if name not in catalog.models or catalog.models[name].weights is None:
            raise CatalogError(f"starter: {name!r} is not the id of a model with weights")


def read_part(table: Table, known: Sequence[str]) -> dict[str, Any]:
    """As it stands: its values are checked where a model takes them over."""
    table.allow(known)
    return table.left


def read_model(name: str, table: Table, families: Mapping[str, dict[str, Any]], has_variants: bool) -> Model:
    family = table.take("family", str, None)
    inherited = families.get(family or "", {})
    table.left = {**inherited, **table.left}
    usual = Table(f"{table.where}: defaults", inherited.get("defaults", {}))
    defaults = {**read_defaults(usual), **read_defaults(table.table("defaults"))}
    sizes, resolutions = read_all_sizes(table, defaults.get("resolution"))
    model = Model(
        id=name,
        name=table.take("name", str),
        kind=cast(Kind, table.among("kind", table.take("kind", str), Kind)),
        family=family,
        workflows=tuple(table.among("workflows", workflow, Workflow) for workflow in table.words("workflows")),
        credits=read_credits(table.table("credits")),
        licence=table.take("licence", str),
        licence_url=table.take("licence_url", str, None),
        non_commercial=table.take("non_commercial", bool, False),
        gated=table.take("gated", bool, False),
        aliases=table.words("aliases"),
        defaults=defaults,
        sizes=sizes,
        resolutions=resolutions,
        size_multiple=table.take("size_multiple", int, 1),
        frames=read_frames(table.table("frames")) if "frames" in table.left else None,
        dtype=table.among("dtype", table.take("dtype", str, "float32"), Dtype),
        dtypes={part: table.among("dtypes", dtype, Dtype) for part, dtype in table.mapping("dtypes", str).items()},
        quantisation=read_quantisation(table),
        compiled=table.take("compiled", bool, False),
        working=read_working(table.table("working")),
        weights=read_source(table.table("weights")) if "weights" in table.left else None,
        remote=table.mapping("remote", str),
        retired=read_retired(table.table("retired")) if "retired" in table.left else None,
        weights_gib=table.take("weights_gib", float, None),
    )
    loras = table.table("loras")
    table.done()
    check_model(table.where, model, has_variants)
    return replace(model, loras={each: read_lora(each, loras.table(each), model) for each in list(loras.left)})


def read_demo(model: Model, demos: Mapping[str, dict[str, Any]], own: dict[str, Any], folder: Path) -> Model | None:
    """The model on its family's demo weights, if it has any. What callers may set is what the model lets them set."""
    usual = demos.get(model.family or "", {})
    if model.weights is None or not (usual or own):
        return None
    table = Table(f"[demo.{model.family}] for {model.id}", {**usual, **own, "resolutions": [*model.resolutions]})
    defaults = {key: value for key, value in read_defaults(table.table("defaults")).items() if key in model.defaults}
    sizes, resolutions = read_all_sizes(table, model.defaults.get("resolution"))
    if [*map(set, resolutions.values())] != [*map(set, model.resolutions.values())] or set(sizes) != set(model.sizes):
        raise CatalogError(f"{table.where}: sizes has other aspect ratios than the model")
    demo = replace(
        model,
        id=f"{model.id}+demo",
        stands_for=model.id,
        defaults={**model.defaults, **defaults},
        sizes=sizes,
        resolutions=resolutions,
        size_multiple=table.take("size_multiple", int, model.size_multiple),
        frames=read_frames(table.table("frames")) if "frames" in table.left else model.frames,
        dtype=table.among("dtype", table.take("dtype", str, "float32"), Dtype),
        dtypes={},
        quantisation=None,
        compiled=False,
        working=read_working(table.table("working")),
        weights=Source("path", path=str(folder / table.take("path", str))),
        architecture=table.take("architecture", str, ""),
        remote={},
        loras={},
        weights_gib=None,
    )
    table.done()
    check_model(table.where, demo, has_variants=False)
    return demo


def find_variants(
    name: str, variants: Mapping[str, list[str]], models: Mapping[str, Model]
) -> dict[str, tuple[Model, ...]]:
    """Raises `CatalogError` unless each is a model with weights that does the workflow as `name` does."""
    for workflow, ids in variants.items():
        for each in (name, *ids):
            if each not in models or workflow not in models[each].workflows:
                raise CatalogError(f"[models.{name}]: variants.{workflow}: {each} is no model that does {workflow}")
            if (each == name) is (models[each].weights is not None):
                raise CatalogError(f"[models.{name}]: variants.{workflow}: not {name} but its variants need weights")
    return {workflow: tuple(models[each] for each in ids) for workflow, ids in variants.items()}


def with_base(model: Model, base: str, models: Mapping[str, Model]) -> Model:
    """Raises `CatalogError` unless a GGUF file, and nothing else, has a base of its family with weights of its own."""
    if (model.quantisation == "gguf") is not bool(base):
        raise CatalogError(f"[models.{model.id}]: quantisation = 'gguf' and base go together")
    if not base:
        return model
    found, source = models.get(base), model.weights
    if found is None or found.weights is None or found.quantisation or found.family != model.family:
        raise CatalogError(f"[models.{model.id}]: base {base!r} is no plain {model.family} model with weights")
    names = [name for name in (*source.files, source.url, source.path) if name] if source else []
    if len(names) != 1 or not ONE_GGUF.fullmatch(names[0]):
        raise CatalogError(f"[models.{model.id}]: weights must name the one .gguf file")
    return replace(model, base=found)


def check_model(where: str, model: Model, has_variants: bool) -> None:
    if not model.workflows:
        raise CatalogError(f"{where}: workflows is empty")
    if model.weights is None and not model.remote and not has_variants:
        raise CatalogError(f"{where} runs nowhere: it has neither weights nor remote")
    if model.compiled and (model.quantisation or model.family not in ("flux", "wan", "ltx")):
        raise CatalogError(f"{where}: compiled is for plain models of Flux, Wan and LTX")
    if model.weights is not None and model.family is None:
        raise CatalogError(f"{where}: family is missing, and weights need one to be loaded")
    for workflow in model.remote:
        if workflow not in model.workflows:
            raise CatalogError(f"{where}: remote.{workflow} is not one of its workflows")
    for sizes in (model.sizes, *model.resolutions.values()):
        for ratio, size in sizes.items():
            if any(side % model.size_multiple for side in size):
                raise CatalogError(f"{where}: sizes.{ratio} is not a multiple of {model.size_multiple}")


def read_credits(table: Table) -> Credits:
    read = Credits(table.take("base", int), table.take("per_second", int, 0), table.mapping("resolutions", float))
    table.done()
    return read


def read_quantisation(table: Table) -> Quantisation | None:
    name = table.take("quantisation", str, None)
    return cast(Quantisation, table.among("quantisation", name, Quantisation)) if name else None


def read_retired(table: Table) -> Retired:
    read = Retired(table.take("date", str), table.take("successor", str, None))
    table.done()
    return read


def read_defaults(table: Table) -> Mapping[str, Any]:
    table.allow(TUNABLE)
    return {key: table.take(key, TUNABLE[key]) for key in list(table.left)}
