"""From what a caller sent to what an endpoint at fal is sent. Pure; only what the caller set is sent.

A remote job's params are the fields that the caller gave and that have an effect, in camelCase, with the names of input
files under `images`, `video` and `audio`. They are kept as given, since fal's models name and count things in their own
ways; what is sent is made from them and the endpoint's data when the job is handed over.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic.alias_generators import to_camel

from pipelines.catalog.catalog import Catalog, Model
from pipelines.catalog.endpoints import Endpoint
from pipelines.params import Body
from server.errors import UnsupportedAspectRatio, UnsupportedDuration, UnsupportedResolution, invalid_field

MAX_CHOSEN_SEED = 2**31 - 1
"""Every endpoint takes seeds up to here; some no higher ones."""

IMAGELESS = frozenset({"text-to-image", "text-to-video", "extend", "lip-sync"})


@dataclass(frozen=True)
class RemoteInputs:
    """Names of stored input files. `seconds` is the length of the video, if there is one."""

    images: tuple[str, ...] = ()
    video: str | None = None
    audio: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RemoteCall:
    """`seconds` is the length asked for, or else the usual one; `ignored` are fields, as they were sent."""

    endpoint: Endpoint
    params: Mapping[str, Any]
    seconds: float
    ignored: frozenset[str]


def resolve(catalog: Catalog, model: Model, workflow: str, body: Body, inputs: RemoteInputs) -> RemoteCall:
    """Raises InvalidBody, UnsupportedAspectRatio or UnsupportedDuration, naming what there is."""
    inputs = replace(inputs, images=()) if workflow in IMAGELESS else inputs
    endpoint = _choose(catalog, model, workflow, len(inputs.images))
    given = {name: body.given[name] for name in body.given if name in _known(endpoint)}
    _check(model, endpoint, given)
    params = {to_camel(name): value for name, value in given.items()} | _files(endpoint, inputs)
    if _needs_seed(model, endpoint, given):
        params["seed"] = secrets.randbelow(MAX_CHOSEN_SEED + 1)
    return RemoteCall(endpoint, params, _seconds(model, endpoint, given, inputs), _ignored(body, given, params))


def arguments(endpoint: Endpoint, params: Mapping[str, Any], url_of: Callable[[str], str]) -> dict[str, Any]:
    """The request's body. `url_of` tells under which URL fal reads an input file."""
    sent = {theirs: params[to_camel(ours)] for ours, theirs in endpoint.takes.items() if to_camel(ours) in params}
    if endpoint.size and "aspectRatio" in params:
        sent[endpoint.size.field] = endpoint.size.values[params["aspectRatio"]]
    if endpoint.duration and "duration" in params:
        sent[endpoint.duration.field] = endpoint.duration.value(int(params["duration"]))
    images = [url_of(name) for name in params.get("images", ())]
    if images and endpoint.images_field:
        sent[endpoint.images_field] = images
    elif images:
        sent |= dict(zip(endpoint.image_fields, images, strict=False))
    for field, name in ((endpoint.video_field, "video"), (endpoint.audio_field, "audio")):
        if field and name in params:
            _place(sent, field, url_of(params[name]))
    return sent


def caller_field_names(endpoint: Endpoint) -> dict[str, str]:
    """Each of the endpoint's fields with the name that callers know it by."""
    names = {theirs: to_camel(ours) for ours, theirs in endpoint.takes.items()}
    if endpoint.size:
        names[endpoint.size.field] = "aspectRatio"
    if endpoint.duration:
        names[endpoint.duration.field] = "duration"
    names |= dict.fromkeys(endpoint.image_fields, "imageUrl") | {endpoint.images_field: "imageUrls"}
    names |= {endpoint.video_field.split(".")[0]: "videoUrl", endpoint.audio_field.split(".")[0]: "audioUrl"}
    return names


def _choose(catalog: Catalog, model: Model, workflow: str, images: int) -> Endpoint:
    """The workflow's endpoint, or the one for several images."""
    endpoint = catalog.endpoint(model.remote[workflow])
    if images > endpoint.holds_images and endpoint.several:
        endpoint = catalog.endpoint(endpoint.several)
    if images > endpoint.holds_images:
        most = endpoint.holds_images
        raise invalid_field(
            "imageUrls", f"{model.name} takes at most {most} image{'s' if most > 1 else ''} for {workflow}"
        )
    return endpoint


def _known(endpoint: Endpoint) -> set[str]:
    sized = {"aspect_ratio"} if endpoint.size else set()
    return {*endpoint.takes} | sized | ({"duration"} if endpoint.duration else set())


def _check(model: Model, endpoint: Endpoint, given: Mapping[str, Any]) -> None:
    if endpoint.size and "aspect_ratio" in given and given["aspect_ratio"] not in endpoint.size.values:
        ratios = list(endpoint.size.values)
        raise UnsupportedAspectRatio(
            f"{model.name} has no aspect ratio {given['aspect_ratio']}; it has {', '.join(ratios)}.",
            aspectRatio=given["aspect_ratio"],
            aspectRatios=ratios,
        )
    if endpoint.duration and "duration" in given and given["duration"] not in endpoint.duration.seconds:
        lengths = list(endpoint.duration.seconds)
        message = f"{model.name} makes {_list(lengths)} seconds, not {given['duration']:g}"
        raise invalid_field("duration", message, cls=UnsupportedDuration, durations=lengths)
    for name, choices in endpoint.choices.items():
        if name in given and given[name] not in choices:
            if name == "resolution":
                told = f"{model.name} has no resolution {given[name]}; it has {_list(choices)}."
                raise UnsupportedResolution(told, resolution=given[name], resolutions=list(choices))
            raise invalid_field(to_camel(name), f"{model.name} has {_list(choices)}, not {given[name]}")


def _files(endpoint: Endpoint, inputs: RemoteInputs) -> dict[str, Any]:
    files: dict[str, Any] = {"images": list(inputs.images)} if inputs.images else {}
    if endpoint.video_field and inputs.video:
        files["video"] = inputs.video
    if endpoint.audio_field and inputs.audio:
        files["audio"] = inputs.audio
    return files


def _needs_seed(model: Model, endpoint: Endpoint, given: Mapping[str, Any]) -> bool:
    """An image's answer has its seed. Where fal would not say which it took, choose one."""
    return model.kind == "image" and "seed" in endpoint.takes and not endpoint.returns_seed and "seed" not in given


def _seconds(model: Model, endpoint: Endpoint, given: Mapping[str, Any], inputs: RemoteInputs) -> float:
    if "duration" in given:
        return float(given["duration"])
    usual = float(model.defaults.get("duration", 0))
    if endpoint.audio_field:
        return inputs.seconds or usual
    lengths = endpoint.duration.seconds if endpoint.duration else ()
    return usual if usual in lengths or not lengths else float(lengths[0])


def _ignored(body: Body, given: Mapping[str, Any], params: Mapping[str, Any]) -> frozenset[str]:
    """Fields, as they were sent, that nothing came of."""
    of_files = {"images": {"image_url", "image_urls"}, "video": {"video_url"}, "audio": {"audio_url"}}
    used = {*given, "model", "workflow"}.union(*(fields for name, fields in of_files.items() if name in params))
    defaults = {name for name in body.given if name not in body.model_fields_set}
    return body.unknown | {to_camel(name) for name in body.given if name not in used | defaults}


def _place(sent: dict[str, Any], path: str, value: Any) -> None:
    *objects, last = path.split(".")
    for name in objects:
        sent = sent.setdefault(name, {})
    sent[last] = value


def _list(words: Sequence[Any]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last
