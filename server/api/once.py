"""The Idempotency-Key of a generation call: the same key with the same body is the same job."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request

from pipelines.params import Body
from server import idempotency, ledger
from server.accounts import Caller
from server.envelope import set_header
from server.intake import Accepted
from server.jobs import Claim
from server.services import Services
from server.store import Store


async def accept_once(
    request: Request, served: Services, caller: Caller, kind: str, body: Body, own_bases: Sequence[str]
) -> Accepted:
    """The job of this request: a new one, or the one that its Idempotency-Key stands for, ended or not.

    A key that another call takes in the meantime stands for that call's job from then on: charged is only one.
    """
    claim, route = await _claim_of(request, body), request.headers.get("x-route")
    while claim:
        found, claim = await served.store.call(_look_up, served.store, caller.user_id, claim, served.clock())
        if found:
            set_header(request, "Idempotent-Replayed", "true")
            return found
        try:
            return await served.intake.accept(caller, kind, body, own_bases, claim, route)
        except idempotency.KeyTaken:
            continue
    return await served.intake.accept(caller, kind, body, own_bases, route=route)


async def _claim_of(request: Request, body: Body) -> Claim | None:
    """A body with a picture in it takes long to hash: off the event loop with it."""
    key = idempotency.parse(request.headers.getlist("idempotency-key"))
    if key is None:
        return None
    return Claim(request.url.path, key, await asyncio.to_thread(idempotency.hash_of, body))


def _look_up(store: Store, user_id: str, claim: Claim, now: float) -> tuple[Accepted | None, Claim]:
    """The job to answer with, if any; else the claim, on a key whose last job's answer is not told again."""
    claimed = idempotency.find(store.db, user_id, claim.route, claim.key, claim.body_hash, now)
    if claimed is None:
        return None, claim
    job = store.job(claimed.job_id)
    if idempotency.is_kept(job):
        return Accepted(job, ledger.balance(store.db, user_id), claimed.ignored), claim
    return None, replace(claim, replaces=job.id)
