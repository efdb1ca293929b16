"""A request's way to a job: choose the model and workflow, store the inputs, complete the params, charge and queue."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.catalog.catalog import Model
from pipelines.media.video import VideoInfo
from pipelines.params import Body
from server.accounts import ledger
from server.accounts.pricing import price_of
from server.accounts.users import Caller
from server.dispatch.dispatcher import Dispatcher
from server.errors import DoesNotFit, PlantainError, invalid_field
from server.files.inputs import ImageInputs, StoredClip, StoredImage, VideoInputs
from server.files.store import FileStore
from server.intake.params import InputVideo, input_urls, resolve, workflow_of
from server.intake.routing import choose_route, may_fall_back, read_route
from server.jobs import idempotency
from server.jobs.job import IdempotencyClaim, Job, NewJob
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry
from server.remote import arguments
from server.remote.runner import RemoteRunner
from server.settings import Route

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "mp4": ".mp4"}


@dataclass(frozen=True)
class AcceptedJob:
    """A queued job, the caller's balance after its charge, and what of the request had no effect."""

    job: Job
    balance: int
    ignored: frozenset[str]


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked for, by whom."""

    caller: Caller
    model: Model
    workflow: str
    body: Body
    idempotency: IdempotencyClaim | None


@dataclass
class StoredInputs:
    """The files that a request names, as far as they are stored."""

    images: list[StoredImage] = field(default_factory=list)
    video: StoredClip | None = None
    audio: StoredClip | None = None

    @property
    def fresh_names(self) -> tuple[str, ...]:
        """Those that were stored for this request."""
        stored: list[StoredImage | StoredClip | None] = [*self.images, self.video, self.audio]
        return tuple(each.name for each in stored if each and each.fresh)

    @property
    def footage(self) -> InputVideo | None:
        info = self.video.info if self.video else None
        if self.video is None or not isinstance(info, VideoInfo):
            return None
        return InputVideo(self.video.name, info.width, info.height, info.fps, info.duration_s)

    def for_fal(self) -> arguments.RemoteInputs:
        return arguments.RemoteInputs(
            images=tuple(image.name for image in self.images),
            video=self.video.name if self.video else None,
            audio=self.audio.name if self.audio else None,
            seconds=self.video.duration_s if self.video else None,
        )


class Intake:
    """Nothing is charged, and nothing stays on disk, of a request that is refused.

    Of one that breaks off, what belongs to no job is swept at the next start.
    """

    def __init__(
        self,
        shelf: ModelRegistry,
        media: ImageInputs,
        clips: VideoInputs,
        files: FileStore,
        dispatcher: Dispatcher,
        desk: RemoteRunner,
        route: Route,
    ) -> None:
        self.shelf, self.media, self.clips, self.files = shelf, media, clips, files
        self.dispatcher, self.desk, self.route = dispatcher, desk, route

    async def accept(
        self,
        caller: Caller,
        kind: str,
        body: Body,
        own_bases: Sequence[str],
        claim: IdempotencyClaim | None = None,
        route: str | None = None,
    ) -> AcceptedJob:
        """Raises what the caller or the operator has to mend, see `server.errors`; and KeyTaken for a claim's key."""
        model = self._model(kind, body)
        order = GenerationRequest(caller, model, workflow_of(model, body, self.shelf.catalog), body, claim)
        chosen = self._route_with_loras(order, read_route(route, self.route))
        place = choose_route(model, order.workflow, chosen, self.shelf, self.desk, body.given.get("resolution"))
        inputs = StoredInputs()
        try:
            await self._store(body, own_bases, inputs)
            if place == "fal":
                return await self._submit_remote(order, inputs)
            try:
                return await self._submit(order, inputs, chosen)
            except DoesNotFit:
                if not may_fall_back(model, order.workflow, chosen, self.desk):
                    raise
                return await self._submit_remote(order, inputs)
        except Exception:  # but not a call that breaks off: its job may be in the queue already, and needs them
            self._discard(inputs)
            raise

    def _route_with_loras(self, order: GenerationRequest, route: Route) -> Route:
        """Raises InvalidBody or ModelNotInstalled for LoRAs that cannot be had; those that can run here only."""
        given = order.body.given
        ids = [lora.id for lora in given.get("loras", ())]
        if not ids:
            return route
        model = self.shelf.chosen(order.model, order.workflow, given.get("resolution"))
        message = "they work here only, and the route is remote-only" if route == "remote-only" and model.loras else ""
        message = "each may be picked once" if len(set(ids)) < len(ids) else message
        if message:
            raise invalid_field("loras", message)
        self.shelf.loras(model, ids)
        self.shelf.weights(model)
        return "local-only"

    async def _store(self, body: Body, own_bases: Sequence[str], inputs: StoredInputs) -> None:
        for url in input_urls(body):
            inputs.images.append(await self.media.image(url, own_bases))
        given = body.given
        if "video_url" in given:
            inputs.video = await self.clips.take("video", given["video_url"], own_bases)
        if "audio_url" in given:
            inputs.audio = await self.clips.take("audio", given["audio_url"], own_bases)

    async def _submit(self, order: GenerationRequest, inputs: StoredInputs, route: Route) -> AcceptedJob:
        here = self.shelf.chosen(order.model, order.workflow, order.body.given.get("resolution"))
        demo = self.shelf.demo(here)
        resolved = resolve(demo or here, order.workflow, order.body, inputs.images, inputs.footage)
        params = resolved.params.model_dump(mode="json", by_alias=True)
        new = replace(
            self._job(order, inputs, params, resolved.ignored, SUFFIXES[params.get("outputFormat", "png")]),
            model=here.id,
            pixels=resolved.pixels,
            credits=price_of(order.model, {**params, **resolved.priced}),
            remote_fallback=self._remote_fallback(order, inputs, route),
            weights="demo" if demo else "installed",
        )
        runnable = self.shelf.runnable(here.id, resolved.pixels, params, new.weights)
        job, balance = await self.dispatcher.submit(new, runnable)
        return AcceptedJob(job, balance, resolved.ignored)

    def _remote_fallback(self, order: GenerationRequest, inputs: StoredInputs, route: Route) -> dict[str, Any] | None:
        """How the job would run at fal, if memory runs out here; None where it may not, or fal cannot do it."""
        if not may_fall_back(order.model, order.workflow, route, self.desk):
            return None
        try:
            call = arguments.resolve(self.shelf.catalog, order.model, order.workflow, order.body, inputs.for_fal())
        except PlantainError:
            return None
        return {"endpoint": call.endpoint.id, "params": dict(call.params)}

    async def _submit_remote(self, order: GenerationRequest, inputs: StoredInputs) -> AcceptedJob:
        """The output's suffix is a guess, put right when the output is there."""
        call = arguments.resolve(self.shelf.catalog, order.model, order.workflow, order.body, inputs.for_fal())
        new = replace(
            self._job(order, inputs, call.params, call.ignored, ".mp4" if order.model.kind == "video" else ".png"),
            credits=price_of(order.model, {**call.params, "duration": call.seconds}),
            remote_endpoint=call.endpoint.id,
        )
        job, balance = await self.dispatcher.submit_remote(new)
        return AcceptedJob(job, balance, call.ignored)

    def _job(
        self,
        order: GenerationRequest,
        inputs: StoredInputs,
        params: Mapping[str, Any],
        ignored: frozenset[str],
        suffix: str,
    ) -> NewJob:
        return NewJob(
            id=f"job_{secrets.token_hex(12)}",
            user_id=order.caller.user_id,
            key_id=order.caller.key_id,
            kind=order.model.kind,
            model=order.model.id,
            workflow=order.workflow,
            params=params,
            pixels=0,
            output_name=self.files.new_name(suffix),
            credits=0,
            input_names=inputs.fresh_names,
            max_concurrent_jobs=order.caller.plan.jobs_at_once,
            auto_top_up=order.caller.is_local,
            weight=order.caller.plan.weight,
            idempotency=order.idempotency,
            ignored=tuple(ignored),
        )

    def _model(self, kind: str, body: Body) -> Model:
        name = body.given.get("model") or self.shelf.catalog.default_models[kind]
        model = self.shelf.find(name)
        if model.kind != kind:
            raise invalid_field("model", f"{model.name} is a model for {model.kind}, not for {kind}")
        return model

    def _discard(self, inputs: StoredInputs) -> None:
        for name in inputs.fresh_names:
            self.files.delete(name)


def _replay(
    store: JobStore, user_id: str, claim: IdempotencyClaim, now: float
) -> tuple[AcceptedJob | None, IdempotencyClaim]:
    """The job to answer with, if any; else the claim, on a key whose last job's answer is not told again."""
    claimed = idempotency.find(store.db, user_id, claim.route, claim.key, claim.body_hash, now)
    if claimed is None:
        return None, claim
    job = store.job(claimed.job_id)
    if idempotency.is_replayable(job):
        return AcceptedJob(job, ledger.balance(store.db, user_id), claimed.ignored), claim
    return None, replace(claim, replaces=job.id)
