"""A request's way to a job: choose the model and workflow, store the inputs, complete the params, charge and queue."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.catalog import Model
from pipelines.params import Body
from server.accounts import Caller
from server.dispatcher import Dispatcher
from server.errors import InvalidBody
from server.jobs import Claim, Job, NewJob
from server.media import Media, StoredImage
from server.outputs import Files
from server.prices import price_of
from server.requests import input_urls, resolve, workflow_of
from server.shelf import Shelf

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True)
class Accepted:
    """A queued job, the caller's balance after its charge, and what of the request had no effect."""

    job: Job
    balance: int
    ignored: frozenset[str]


class Intake:
    """Nothing is charged, and nothing stays on disk, of a request that is refused."""

    def __init__(self, shelf: Shelf, media: Media, files: Files, dispatcher: Dispatcher) -> None:
        self.shelf, self.media, self.files, self.dispatcher = shelf, media, files, dispatcher

    async def accept(
        self, caller: Caller, kind: str, body: Body, own_bases: Sequence[str], claim: Claim | None = None
    ) -> Accepted:
        """Raises what the caller or the operator has to mend, see `server.errors`; and KeyTaken for a claim's key."""
        model = self._model(kind, body)
        workflow = workflow_of(model, body, self.shelf.catalog)
        self.shelf.weights(model)
        images: list[StoredImage] = []
        try:
            for url in input_urls(body):
                images.append(await self.media.image(url, own_bases))
            return await self._submit(caller, model, workflow, body, images, claim)
        except BaseException:
            self._discard(images)
            raise

    async def _submit(
        self,
        caller: Caller,
        model: Model,
        workflow: str,
        body: Body,
        images: Sequence[StoredImage],
        claim: Claim | None,
    ) -> Accepted:
        resolved = resolve(model, workflow, body, images)
        params = resolved.params.model_dump(mode="json", by_alias=True)
        new = NewJob(
            id=f"job_{secrets.token_hex(12)}",
            user_id=caller.user_id,
            key_id=caller.key_id,
            kind=model.kind,
            model=model.id,
            workflow=workflow,
            params=params,
            pixels=resolved.pixels,
            output_name=self.files.new_name(SUFFIXES[params.get("outputFormat", "png")]),
            credits=price_of(model, params),
            input_names=tuple(image.name for image in images if image.fresh),
            at_once=caller.plan.jobs_at_once,
            tops_up=caller.is_local,
            claim=claim,
            ignored=tuple(resolved.ignored),
        )
        runnable = self.shelf.runnable(model.id, resolved.pixels)
        job, balance = await self.dispatcher.submit(new, runnable)
        return Accepted(job, balance, resolved.ignored)

    def _model(self, kind: str, body: Body) -> Model:
        name = body.given.get("model") or self.shelf.catalog.default_models[kind]
        model = self.shelf.find(name)
        if model.kind != kind:
            issue = {"path": "model", "message": f"{model.name} is a model for {model.kind}, not for {kind}"}
            raise InvalidBody(f"model: {issue['message']}", issues=[issue])
        return model

    def _discard(self, images: Sequence[StoredImage]) -> None:
        for image in images:
            if image.fresh:
                self.files.delete(image.name)
