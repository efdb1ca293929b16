"""From a request to an accepted job: model, route, inputs, params, price, admission."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.catalog.catalog import Model
from pipelines.params import Body
from server.accounts import ledger
from server.accounts.pricing import price_of
from server.accounts.users import Caller
from server.dispatch.dispatcher import Dispatcher
from server.errors import DoesNotFit, PlantainError, invalid_field
from server.files.inputs import AUDIO, IMAGE, VIDEO, InputFiles, StoredAudio, StoredImage, StoredVideo
from server.files.store import FileStore
from server.intake import routing
from server.intake.params import InputVideo, input_urls, resolve, workflow_of
from server.intake.routing import Destination, LocalRun
from server.jobs import idempotency
from server.jobs.job import IdempotencyClaim, Job, NewJob
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry
from server.remote import arguments
from server.remote.runner import RemoteRunner
from server.settings import Route

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "mp4": ".mp4"}


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks for. `route` is the `X-Route` header; `own_base_urls` are addresses of this server."""

    caller: Caller
    kind: str
    body: Body
    own_base_urls: Sequence[str]
    idempotency: IdempotencyClaim | None = None
    route: str | None = None


@dataclass(frozen=True)
class AcceptedJob:
    """A queued job, the caller's balance after its charge, and the request's fields that had no effect.

    `replayed`: the job of an earlier request with the same Idempotency-Key, which may have ended.
    """

    job: Job
    balance: int
    ignored: frozenset[str]
    replayed: bool = False


@dataclass(frozen=True)
class Plan:
    """How a request runs: chosen once."""

    request: GenerationRequest
    model: Model
    workflow: str
    route: Route
    local: LocalRun
    destination: Destination


@dataclass(frozen=True)
class StoredInputs:
    """The input files of a request."""

    images: tuple[StoredImage, ...] = ()
    video: StoredVideo | None = None
    audio: StoredAudio | None = None

    @property
    def new_names(self) -> tuple[str, ...]:
        """Of the files that were stored for this request."""
        return tuple(each.name for each in (*self.images, self.video, self.audio) if each and each.is_new)

    @property
    def input_video(self) -> InputVideo | None:
        if self.video is None:
            return None
        info = self.video.info
        return InputVideo(self.video.name, info.width, info.height, info.fps, info.duration_s)

    def for_remote(self) -> arguments.RemoteInputs:
        return arguments.RemoteInputs(
            images=tuple(image.name for image in self.images),
            video=self.video.name if self.video else None,
            audio=self.audio.name if self.audio else None,
            seconds=self.video.info.duration_s if self.video else None,
        )


class Intake:
    """Accepts requests. One that is refused charges nothing and leaves no file.

    If a call breaks off while its job is being enqueued its files stay; those of no job are deleted at the next start.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        inputs: InputFiles,
        files: FileStore,
        jobs: JobStore,
        dispatcher: Dispatcher,
        remote: RemoteRunner,
        route: Route,
        clock: Callable[[], float],
    ) -> None:
        self.registry, self.inputs, self.files, self.jobs = registry, inputs, files, jobs
        self.dispatcher, self.remote, self.route, self.clock = dispatcher, remote, route, clock

    async def accept(self, request: GenerationRequest) -> AcceptedJob:
        """The request's job: a new one, or the one that its Idempotency-Key stands for.

        Raises what the caller or the operator has to fix, see `server.errors`.
        """
        replay, request = await self._replay(request)
        if replay:
            return replay
        plan = self._plan(request)
        inputs = await self._store(request)
        try:
            if plan.destination == "remote":
                return await self._submit_remote(plan, inputs)
            return await self._submit(plan, inputs)
        except idempotency.KeyAlreadyClaimed:  # by a request that came meanwhile: its job is the answer
            self._delete(inputs.new_names)
            return await self.accept(request)
        except Exception:  # not for a call that breaks off: its job may be queued already, and needs its files
            self._delete(inputs.new_names)
            raise

    async def _replay(self, request: GenerationRequest) -> tuple[AcceptedJob | None, GenerationRequest]:
        if request.idempotency is None:
            return None, request
        find = self.jobs.database.call
        replay, claim = await find(_find_replay, self.jobs, request.caller.user_id, request.idempotency, self.clock())
        return replay, replace(request, idempotency=claim)

    def _plan(self, request: GenerationRequest) -> Plan:
        model = self._model(request.kind, request.body)
        workflow = workflow_of(model, request.body, self.registry.catalog)
        route = routing.read_route(request.route, self.route)
        local = routing.local_run(model, workflow, self.registry, request.body.given.get("resolution"))
        route = self._route_with_loras(request, local, route)
        destination = routing.choose_route(model, workflow, route, local, self.remote)
        return Plan(request, model, workflow, route, local, destination)

    def _model(self, kind: str, body: Body) -> Model:
        name = body.given.get("model") or self.registry.catalog.default_models[kind]
        model = self.registry.find(name)
        if model.kind != kind:
            raise invalid_field("model", f"{model.name} is a model for {model.kind}, not for {kind}")
        return model

    def _route_with_loras(self, request: GenerationRequest, local: LocalRun, route: Route) -> Route:
        """LoRAs run here only. Raises InvalidBody or ModelNotInstalled for those that cannot be used."""
        ids = [lora.id for lora in request.body.given.get("loras", ())]
        if not ids:
            return route
        if local.variant is None:
            raise local.refusal or AssertionError("without a variant there is a reason")
        if len(set(ids)) < len(ids):
            raise invalid_field("loras", "each may be picked once")
        if route == "remote-only" and local.variant.loras:
            raise invalid_field("loras", "they work here only, and the route is remote-only")
        self.registry.loras(local.variant, ids)
        self.registry.weights(local.variant)
        return "local-only"

    async def _store(self, request: GenerationRequest) -> StoredInputs:
        inputs, given, bases = StoredInputs(), request.body.given, request.own_base_urls
        try:
            for url in input_urls(request.body):
                image = await self.inputs.from_url(IMAGE, url, bases)
                inputs = replace(inputs, images=(*inputs.images, image))
            if "video_url" in given:
                inputs = replace(inputs, video=await self.inputs.from_url(VIDEO, given["video_url"], bases))
            if "audio_url" in given:
                inputs = replace(inputs, audio=await self.inputs.from_url(AUDIO, given["audio_url"], bases))
        except BaseException:
            self._delete(inputs.new_names)
            raise
        return inputs

    async def _submit(self, plan: Plan, inputs: StoredInputs) -> AcceptedJob:
        """To the local queue; to fal.ai if no device here could ever hold the job and it may run there."""
        new, ignored = self._local_job(plan, inputs)
        spec = self.registry.runnable(new.model, new.pixels, new.params, new.weights)
        try:
            job, balance = await self.dispatcher.submit(new, spec)
        except DoesNotFit:
            if not routing.may_fall_back(plan.model, plan.workflow, plan.route, self.remote):
                raise
            return await self._submit_remote(plan, inputs)
        return AcceptedJob(job, balance, ignored)

    def _local_job(self, plan: Plan, inputs: StoredInputs) -> tuple[NewJob, frozenset[str]]:
        variant, demo = plan.local.variant, plan.local.demo
        assert variant, "the destination is local"
        resolved = resolve(demo or variant, plan.workflow, plan.request.body, inputs.images, inputs.input_video)
        params = resolved.params.model_dump(mode="json", by_alias=True)
        new = replace(
            self._job(plan, inputs, params, resolved.ignored, SUFFIXES[params.get("outputFormat", "png")]),
            model=variant.id,
            pixels=resolved.pixels,
            credits=price_of(plan.model, {**params, **resolved.priced}),
            remote_fallback=self._remote_fallback(plan, inputs),
            weights="demo" if demo else "installed",
        )
        return new, resolved.ignored

    def _remote_fallback(self, plan: Plan, inputs: StoredInputs) -> dict[str, Any] | None:
        """How the job would run at fal.ai if memory runs out here; None where it may not, or fal cannot do it."""
        if not routing.may_fall_back(plan.model, plan.workflow, plan.route, self.remote):
            return None
        try:
            call = self._remote_call(plan, inputs)
        except PlantainError:
            return None
        return {"endpoint": call.endpoint.id, "params": dict(call.params)}

    def _remote_call(self, plan: Plan, inputs: StoredInputs) -> arguments.RemoteCall:
        catalog, body = self.registry.catalog, plan.request.body
        return arguments.resolve(catalog, plan.model, plan.workflow, body, inputs.for_remote())

    async def _submit_remote(self, plan: Plan, inputs: StoredInputs) -> AcceptedJob:
        """The output's suffix is a guess until the output is there."""
        call = self._remote_call(plan, inputs)
        new = replace(
            self._job(plan, inputs, call.params, call.ignored, ".mp4" if plan.model.kind == "video" else ".png"),
            credits=price_of(plan.model, {**call.params, "duration": call.seconds}),
            remote_endpoint=call.endpoint.id,
        )
        job, balance = await self.dispatcher.submit_remote(new)
        return AcceptedJob(job, balance, call.ignored)

    def _job(
        self, plan: Plan, inputs: StoredInputs, params: Mapping[str, Any], ignored: frozenset[str], suffix: str
    ) -> NewJob:
        caller = plan.request.caller
        return NewJob(
            id=f"job_{secrets.token_hex(12)}",
            user_id=caller.user_id,
            key_id=caller.key_id,
            kind=plan.model.kind,
            model=plan.model.id,
            workflow=plan.workflow,
            params=params,
            pixels=0,
            output_name=self.files.new_name(suffix),
            credits=0,
            input_names=inputs.new_names,
            max_concurrent_jobs=caller.plan.jobs_at_once,
            auto_top_up=caller.is_local,
            weight=caller.plan.weight,
            idempotency=plan.request.idempotency,
            ignored=tuple(ignored),
        )

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.files.delete(name)


def _find_replay(
    jobs: JobStore, user_id: str, claim: IdempotencyClaim, now: float
) -> tuple[AcceptedJob | None, IdempotencyClaim]:
    """The job to answer with, if any; else the claim. A job whose answer is not repeated is replaced."""
    claimed = idempotency.find(jobs.db, user_id, claim.route, claim.key, claim.body_hash, now)
    if claimed is None:
        return None, claim
    job = jobs.job(claimed.job_id)
    if idempotency.is_replayable(job):
        return AcceptedJob(job, ledger.balance(jobs.db, user_id), claimed.ignored, replayed=True), claim
    return None, replace(claim, replaces=job.id)
