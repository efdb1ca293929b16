"""What an endpoint at fal takes, as data: `[endpoints]` and `[endpoint_sizes]` of `weights.toml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.catalog.table import CatalogError, Table, checked
from pipelines.params import GenerateImage, GenerateVideo, UpscaleImage

FIELDS = frozenset({*GenerateImage.model_fields, *GenerateVideo.model_fields, *UpscaleImage.model_fields})
"""What callers may send, by the names used here."""

CARRIED = FIELDS - {
    "model",
    "workflow",
    "image_url",
    "image_urls",
    "video_url",
    "audio_url",
    "aspect_ratio",
    "duration",
}
"""Those of them that reach an endpoint with their value unchanged."""


@dataclass(frozen=True)
class EndpointSize:
    """`values` is what to send in `field` for each aspect ratio: a name, or width and height."""

    field: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class EndpointDuration:
    """The lengths there are, and how to ask for one in `field`.

    With `frames_per_second` in frames, the first one besides; with `form` as text; otherwise as a number of seconds.
    """

    field: str
    seconds: tuple[int, ...]
    form: str = ""
    frames_per_second: int = 0

    def value(self, seconds: int) -> str | int:
        if self.frames_per_second:
            return seconds * self.frames_per_second + 1
        return self.form.format(seconds) if self.form else seconds


@dataclass(frozen=True)
class Endpoint:
    """`takes` maps the fields of callers that it takes as they are to its own names for them.

    Input images go to `image_fields`, one to each, or all to the list `images_field`; with more than those hold, the
    endpoint `several` is called instead. `video_field` and `audio_field` may be paths into an object, with dots.
    `data_urls`: input images may travel in the request itself; otherwise they are uploaded first.
    """

    id: str
    takes: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    size: EndpointSize | None = None
    duration: EndpointDuration | None = None
    image_fields: tuple[str, ...] = ()
    images_field: str = ""
    most_images: int = 1
    several: str = ""
    video_field: str = ""
    audio_field: str = ""
    data_urls: bool = False
    returns_seed: bool = True

    @property
    def serves_any_model(self) -> bool:
        """A service for any video, which does not end with the model that it is offered under."""
        return bool(self.audio_field)

    @property
    def holds_images(self) -> int:
        """How many input images one call can carry."""
        return self.most_images if self.images_field else len(self.image_fields)


def plain(name: str) -> Endpoint:
    """An endpoint that nothing is known of takes a prompt."""
    return Endpoint(name, {"prompt": "prompt"})


def read_endpoints(top: Table) -> dict[str, Endpoint]:
    sizes = {name: read_size(table) for name, table in top.tables("endpoint_sizes").items()}
    return {name: read_endpoint(name, table, sizes) for name, table in top.tables("endpoints").items()}


def read_endpoint(name: str, table: Table, sizes: Mapping[str, EndpointSize]) -> Endpoint:
    endpoint = Endpoint(
        id=name,
        takes=read_takes(table),
        choices=read_choices(table.table("choices")),
        size=read_size_name(table, sizes),
        duration=read_duration(table.table("duration")) if "duration" in table.left else None,
        image_fields=table.words("image_fields"),
        images_field=table.take("images_field", str, ""),
        most_images=table.take("most_images", int, 1),
        several=table.take("several", str, ""),
        video_field=table.take("video_field", str, ""),
        audio_field=table.take("audio_field", str, ""),
        data_urls=table.take("data_urls", bool, False),
        returns_seed=table.take("returns_seed", bool, True),
    )
    table.done()
    return endpoint


def read_takes(table: Table) -> Mapping[str, str]:
    """`takes` lists fields that keep their name, `renamed` those that do not."""
    takes = {word: word for word in table.words("takes")} | dict(table.mapping("renamed", str))
    for word in takes:
        if word not in CARRIED:
            raise CatalogError(f"{table.where}: {word} is none of {', '.join(sorted(CARRIED))}")
    return takes


def read_choices(table: Table) -> Mapping[str, tuple[Any, ...]]:
    table.allow(sorted(CARRIED))
    return {key: tuple(table.take(key, list)) for key in list(table.left)}


def read_size(table: Table) -> EndpointSize:
    field = table.take("field", str)
    listed = {ratio: ratio for ratio in table.words("ratios")}
    return EndpointSize(field, listed | table.left)


def read_size_name(table: Table, sizes: Mapping[str, EndpointSize]) -> EndpointSize | None:
    name = table.take("size", str, "")
    if name and name not in sizes:
        raise CatalogError(f"{table.where}: size {name!r} is none of {', '.join(sizes)}")
    return sizes[name] if name else None


def read_duration(table: Table) -> EndpointDuration:
    where = f"{table.where}: seconds"
    read = EndpointDuration(
        field=table.take("field", str, "duration"),
        seconds=tuple(checked(each, int, where) for each in table.take("seconds", list)),
        form=table.take("form", str, ""),
        frames_per_second=table.take("frames_per_second", int, 0),
    )
    table.done()
    return read
