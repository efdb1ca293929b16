"""A job that ran out of memory in every way here: it goes to fal where it may, charged once and sent once."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipelines.catalog.catalog import Catalog
from pipelines.catalog.reader import load_catalog
from server.accounts import ledger, users
from server.db.database import Database
from server.dispatch.records import mode_named, read_failed_modes, record_attempt
from server.errors import DoesNotFit
from server.files.store import FileStore
from server.intake.routing import may_fall_back
from server.jobs.job import error_of
from server.jobs.store import JobStore
from server.remote.runner import build_remote
from server.scheduling.placement import Attempt
from server.settings import Settings
from tests.dispatch.test_memory import install_test_models
from tests.jobs.test_store import NOW, new_job
from tests.support.fal import KEY, FakeFal
from tests.support.fal_server import LOOPBACK, picture
from tests.support.server import GENERATE, LiveServer, data_url, running

REMOTE = """
[models.hungry-dev.remote]
text-to-image = "fal-ai/flux/dev"
"""
WITH_IMAGE = """image-to-image = "fal-ai/flux/dev/image-to-image"

[endpoints."fal-ai/flux/dev/image-to-image"]
takes = ["prompt"]
image_fields = ["image_url"]
data_urls = true
"""
WORD = {"prompt": "never", "model": "hungry-dev"}
"""It runs out of memory in every way."""


@pytest.fixture
def fal(one_fal: FakeFal) -> FakeFal:
    return one_fal.anew(picture((48, 32)))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, one_fal: FakeFal) -> Settings:
    made = install_test_models(tmp_path_factory.mktemp("last"), "dev")
    text = made.weights_toml.read_text().replace('["text-to-image"]', '["text-to-image", "image-to-image"]')
    text = text.replace("guidance_scale = 3.5", "guidance_scale = 3.5, strength = 0.75")
    made.weights_toml.write_text(text + REMOTE + WITH_IMAGE)
    urls = {"fal_queue_url": f"{one_fal.url}/queue", "fal_rest_url": f"{one_fal.url}/rest", "fal_key": KEY}
    return replace(made, allowed_networks=LOOPBACK, **urls)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def live_server(settings: Settings) -> Iterator[LiveServer]:
    with running(settings) as made:
        yield made


def kinds(live_server: LiveServer, job_id: str) -> list[str]:
    entries = live_server.read("/api/credits/ledger")["entries"]
    return [each["kind"] for each in reversed(entries) if each["jobId"] == job_id]


def rungs(live_server: LiveServer) -> list[dict[str, Any]]:
    return live_server.read("/api/admin/devices")["devices"][0]["oomAttempts"]


def test_it_is_made_at_fal_for_what_it_was_charged(live_server: LiveServer, fal: FakeFal):
    before = live_server.balance()
    answer = live_server.ask(GENERATE, WORD)
    assert answer.status_code == 200, answer.text
    assert live_server.picture(answer.json()["imageUrl"]).size == (48, 32)
    assert answer.headers["x-served-by"] == "fal"
    job = live_server.read("/api/jobs")["jobs"][0]
    assert (job["status"], job["servedBy"], job["credits"]) == ("succeeded", "fal", before - live_server.balance())
    assert kinds(live_server, job["id"]) == ["charge"]
    assert [(each.endpoint, each.arguments["prompt"]) for each in fal.submitted] == [("fal-ai/flux/dev", "never")]
    assert live_server.services.jobs.job(job["id"]).attempts == 1
    last = rungs(live_server)[0]
    assert (last["mode"], last["nextDevice"], last["nextMode"]) == ("streamed, tiled", "fal", None)
    assert live_server.services.dispatcher.state.workers["cpu"].job is None
    assert live_server.ask(GENERATE, {**WORD, "prompt": "a red circle"}).headers["x-served-by"] == "local"


def test_its_input_files_go_along(live_server: LiveServer, fal: FakeFal):
    image = data_url(
        live_server.picture(live_server.ask(GENERATE, {**WORD, "prompt": "a red circle"}).json()["imageUrl"])
    )
    answer = live_server.ask(GENERATE, {**WORD, "imageUrl": image})
    assert answer.status_code == 200, answer.text
    assert fal.submitted[0].endpoint == "fal-ai/flux/dev/image-to-image"
    assert fal.submitted[0].arguments == {"prompt": "never", "image_url": image}


def test_a_caller_who_wants_it_here_has_it_fail_here(live_server: LiveServer, fal: FakeFal):
    before = live_server.balance()
    answer = live_server.ask(GENERATE, WORD, X_Route="local-only")
    assert (answer.status_code, answer.json()["code"]) == (500, "OUT_OF_MEMORY")
    assert fal.submitted == []
    assert live_server.balance() == before
    assert rungs(live_server)[0]["nextDevice"] is None


def test_what_fal_refuses_is_refunded_once(live_server: LiveServer, fal: FakeFal):
    fal.refuse("submit", 403, {"detail": "Forbidden"})
    before = live_server.balance()
    answer = live_server.ask(GENERATE, WORD)
    assert (answer.status_code, answer.json()["code"]) == (503, "REMOTE_KEY_REFUSED")
    assert live_server.balance() == before
    assert kinds(live_server, answer.json()["jobId"]) == ["charge", "refund"]


@pytest.mark.parametrize("forbidden", [{"offline": True}, {"route": "local-only"}, {"fal_key": None}])
def test_nothing_leaves_the_machine_where_the_operator_forbids_it(settings: Settings, forbidden: dict[str, Any]):
    model = load_catalog(settings.weights_toml).models["hungry-dev"]

    def may(settings: Settings) -> bool:
        desk = build_remote(settings, Catalog({}), FileStore(settings.files), lambda: NOW, lambda event: None)
        return may_fall_back(model, "text-to-image", settings.route, desk)

    assert may(settings)
    assert not may(replace(settings, **forbidden))


def test_a_job_is_handed_over_in_one_statement_and_only_once(tmp_path: Path):
    store = JobStore(Database(tmp_path / "plantain.sqlite"))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    remote_fallback = {"endpoint": "fal-ai/flux/dev", "params": {"prompt": "a", "images": ["in.png"]}}
    store.insert(replace(new_job(user, 1), remote_fallback=remote_fallback), NOW)
    store.insert(new_job(user, 2), NOW)
    for job_id in ("job_1", "job_2"):
        store.start(job_id, "gpu0", NOW)
    there = store.move_to_remote("job_1")
    assert there and (there.status, there.served_by, there.attempts) == ("queued", "fal", 0)
    assert (there.remote_endpoint, there.params) == (remote_fallback["endpoint"], remote_fallback["params"])
    assert store.move_to_remote("job_1") is None
    assert store.move_to_remote("job_2") is None, "it may not go there"
    store.requeue("job_2", NOW)
    assert [job.id for job in store.requeue_interrupted(NOW)] == ["job_2"], (
        "what fal is to have does not run here as well"
    )
    assert [job.id for job in store.recover_remote(NOW)] == ["job_1"], "a server that died before it was sent sends it"
    store.fail("job_1", error_of(DoesNotFit("No.")), NOW)
    kinds = [row["kind"] for row in store.db.query("SELECT kind FROM ledger WHERE job_id = 'job_1' ORDER BY id")]
    assert kinds == ["charge", "refund"]
    store.database.close()


def test_only_ways_that_failed_where_the_job_then_ended_well_are_remembered(tmp_path: Path):
    store = JobStore(Database(tmp_path / "plantain.sqlite"))
    user = users.create_user(store.db, "Ada", "ada@example.com", NOW)
    ledger.grant(store.db, user, 90, "test", NOW)
    ways = ["resident", "resident", "resident, tiled", "staged"]
    for number, (way, end) in enumerate(product(ways, ["succeeded", "failed", "elsewhere", "fal", "old"]), 1):
        job_id, device = f"job_{number}", "gpu1" if end == "elsewhere" else "gpu0"
        store.insert(replace(new_job(user, number, 1), remote_fallback={"endpoint": "x", "params": {}}), NOW)
        store.start(job_id, "gpu0", NOW)
        failed, after = Attempt("gpu0", mode_named(way)), Attempt(device, mode_named("staged"))
        at = 1.0 if end == "old" else NOW
        with store.database.atomic() as db:
            record_attempt(db, job_id, "m", failed, after, at, budget_bytes=10 * number, remote_next=end == "fal")
        if device == "gpu1":
            store.requeue(job_id, NOW, count_attempt=False)
            store.start(job_id, device, NOW)
        if end == "fal":
            store.move_to_remote(job_id)
            store.start_remote(job_id, NOW)
        store.fail(job_id, error_of(DoesNotFit("No.")), NOW) if end == "failed" else store.succeed(job_id, {}, NOW)
    remembered = [(each.way.name, each.budget_bytes) for each in read_failed_modes(store.db, NOW - 1)]
    assert remembered == [("resident", 10), ("resident", 60), ("resident, tiled", 110)], "it ended well in `staged`"
    store.database.close()
