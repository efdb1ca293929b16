"""What a job needs on a device, in bytes: by phase, and by the way in which it is run. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipelines.base import STREAMING_SLOTS, TIERS, Component, ExecutionMode, Weights
from pipelines.catalog.catalog import PhaseWorking, Working

WHOLE = tuple(ExecutionMode(tier) for tier in TIERS)
TILED = tuple(ExecutionMode(tier, tiled=True) for tier in TIERS)


@dataclass(frozen=True)
class Shape:
    """What working bytes grow with: `pixels` of one frame, `frames`. `passes` is how often the blocks are run."""

    pixels: int
    frames: int = 1
    passes: int = 1


@dataclass(frozen=True)
class Phase:
    """`keys` are the components that it needs; `tiled_bytes` what it works in when it decodes in tiles, if it can.

    `learned` are peaks that were measured, headroom added: they count before the estimates.
    """

    name: str
    keys: tuple[str, ...]
    working_bytes: int
    tiled_bytes: int | None = None
    learned: tuple[tuple[ExecutionMode, int], ...] = ()

    def bytes_in(self, way: ExecutionMode) -> int:
        estimate = self.working_bytes if self.tiled_bytes is None or not way.tiled else self.tiled_bytes
        return dict(self.learned).get(ExecutionMode(way.tier, way.tiled), estimate)


@dataclass(frozen=True)
class Need:
    """`components` are (key, weights_bytes); `working_bytes` is what a run takes beside them, in its largest phase.

    `blocks` are (key, bytes of each block) of components that can be streamed. Without `phases` there is but one, and
    only the tier `resident`. `ways` and `devices`, where given, are the only ones, as for a job that ran out of memory.
    """

    components: tuple[tuple[str, int], ...]
    working_bytes: int
    phases: tuple[Phase, ...] = ()
    blocks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    passes: int = 1
    ways: tuple[ExecutionMode, ...] | None = None
    devices: frozenset[str] | None = None

    @cached_property
    def weights_bytes(self) -> int:
        return sum(weights_bytes for _, weights_bytes in self.components)

    @cached_property
    def total_bytes(self) -> int:
        """The least that a device must have."""
        return min(self.bytes_in(way) for way in self.possible)

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(key for key, _ in self.components)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return dict(self.components)

    @cached_property
    def possible(self) -> tuple[ExecutionMode, ...]:
        """Ways that this model can be run in, those first that make the same pixels; each smaller than some other."""
        if self.ways is not None:
            return self.ways
        can_tile = any(phase.tiled_bytes is not None for phase in self.phases)
        ways = [way for way in (*WHOLE, *TILED) if way.tiled <= can_tile and self._can(way)]
        return tuple(ways)

    def _can(self, way: ExecutionMode) -> bool:
        if way.tier == "staged":
            return len(self.phases) > 1
        return way.tier == "resident" or any(key in dict(self.blocks) for key in self._streamable())

    def _streamable(self) -> set[str]:
        return {key for phase in self.phases if (key := self.streamed_key(phase))}

    def bytes_in(self, way: ExecutionMode) -> int:
        """The most that a run in this way has on the device at once; streamed, with no block kept."""
        if way.tier == "resident" or not self.phases:
            return self.weights_bytes + self.working_in(way)
        return max(self.phase_weights(phase, way) + phase.bytes_in(way) for phase in self.phases)

    def working_in(self, way: ExecutionMode) -> int:
        return max((phase.bytes_in(way) for phase in self.phases), default=self.working_bytes)

    def phase_weights(self, phase: Phase, way: ExecutionMode) -> int:
        """A phase's weights on the device: staged all of its components, streamed the least that they can be."""
        whole = sum(self.sizes.get(key, 0) for key in phase.keys)
        key = self.streamed_key(phase) if way.tier == "streamed" else None
        return whole - self.sizes[key] + self.min_streamed_bytes(key) if key else whole

    def min_streamed_bytes(self, key: str) -> int:
        """A streamed component's bytes on the device: what lies outside its blocks, and the slots."""
        blocks = dict(self.blocks)[key]
        return self.sizes[key] - sum(blocks) + STREAMING_SLOTS * max(blocks)

    def streamed_key(self, phase: Phase) -> str | None:
        """The phase's largest component, if streaming makes it smaller."""
        key = max(phase.keys, key=lambda each: self.sizes.get(each, 0), default=None)
        return key if key in dict(self.blocks) and self.min_streamed_bytes(key) < self.sizes[key] else None

    def kept(self, budget_bytes: int, way: ExecutionMode) -> tuple[tuple[str, int], ...]:
        """Of a device with this budget: the components that must be streamed, and the bytes of blocks that may stay."""
        if way.tier != "streamed":
            return ()
        found: dict[str, int] = {}
        for phase in self.phases:
            spare_bytes = (
                budget_bytes - phase.bytes_in(way) - self.phase_weights(phase, ExecutionMode("staged", way.tiled))
            )
            key = self.streamed_key(phase)
            if key and spare_bytes < 0:
                room = self.sizes[key] + spare_bytes - self.min_streamed_bytes(key)
                found[key] = min(room, found.get(key, room))
        return tuple(found.items())


def need_of(
    weights: Weights,
    working: Working,
    shape: Shape | int,
    learned: Mapping[str, Iterable[tuple[ExecutionMode, int]]] | None = None,
) -> Need:
    """The need of one run; components that are one and the same count once. `learned` is by phase."""
    shape = Shape(shape) if isinstance(shape, int) else shape
    components = {component.key: component for component in weights.components}
    phases = [phase_of(each, weights, shape, learned or {}) for each in working.phases]
    return Need(
        components=tuple((key, component.weights_bytes) for key, component in components.items()),
        working_bytes=estimate(working, shape),
        phases=tuple(phases or single_phase(weights, working, shape, learned or {})),
        blocks=tuple((key, component.block_bytes) for key, component in components.items() if component.block_bytes),
        passes=shape.passes,
    )


def with_extra_bytes(need: Need, more_bytes: int) -> Need:
    """The same need with so many bytes more in every phase, whatever was measured without them."""
    phases = [
        replace(
            phase,
            working_bytes=phase.working_bytes + more_bytes,
            tiled_bytes=None if phase.tiled_bytes is None else phase.tiled_bytes + more_bytes,
            learned=tuple((way, size + more_bytes) for way, size in phase.learned),
        )
        for phase in need.phases
    ]
    return replace(need, working_bytes=need.working_bytes + more_bytes, phases=tuple(phases))


def phase_of(
    working: PhaseWorking, weights: Weights, shape: Shape, learned: Mapping[str, Iterable[tuple[ExecutionMode, int]]]
) -> Phase:
    """Of the components that `weights.toml` names, those that this model has."""
    tiled_bytes = (
        min(working.tiled_bytes, working.bytes_for(shape.pixels, shape.frames)) if working.tiled_bytes else None
    )
    return Phase(
        name=working.name,
        keys=tuple(dict.fromkeys(part.key for part in weights.components if part.name in working.components)),
        working_bytes=working.bytes_for(shape.pixels, shape.frames),
        tiled_bytes=tiled_bytes,
        learned=tuple(learned.get(working.name, ())),
    )


def single_phase(
    weights: Weights, working: Working, shape: Shape, learned: Mapping[str, Iterable[tuple[ExecutionMode, int]]]
) -> list[Phase]:
    """For a family of one phase: all its components, under whatever name the phase was measured."""
    known = [entry for entries in learned.values() for entry in entries]
    if not known:
        return []
    largest = tuple((way, max(size for each, size in known if each == way)) for way in dict(known))
    keys = tuple(dict.fromkeys(part.key for part in weights.components))
    return [Phase("run", keys, estimate(working, shape), learned=largest)]


def estimate(working: Working, shape: Shape) -> int:
    phases = [phase.bytes_for(shape.pixels, shape.frames) for phase in working.phases]
    return max(phases, default=working.fixed_bytes + working.bytes_per_pixel * shape.pixels)


def shape_of(params: Mapping[str, Any], pixels: int) -> Shape:
    """From a job's params, as they are stored (camelCase)."""
    steps = int(params.get("numInferenceSteps", 1))
    guided = 2 if "numFrames" in params and float(params.get("guidanceScale", 0)) > 1 else 1
    return Shape(pixels, int(params.get("numFrames", 1)), max(1, steps * guided))


def component_bytes(components: Iterable[Component]) -> int:
    """Each key once."""
    return sum({component.key: component.weights_bytes for component in components}.values())
