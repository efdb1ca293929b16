"""Jobs at fal: where they run, how they end, what goes wrong, and that nothing is sent or charged twice."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.remote.job import RemoteTimeouts
from server.settings import Settings, from_environment
from tests.support.fal import KEY, FakeFal
from tests.support.fal_server import FILM, PICTURE, QUICK, RemoteHouse, Street, data_url, picture

ASK = {"prompt": "a boat", "model": "flux-pro"}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def fal(one_fal: FakeFal) -> FakeFal:
    return one_fal.anew(picture())


@pytest.fixture
def street(fal: FakeFal, tmp_path: Path) -> Street:
    return Street(tmp_path / "data", fal)


@pytest.fixture
def live_server(street: Street) -> Iterator[RemoteHouse]:
    with street.live_server() as live_server:
        yield live_server


@pytest.fixture
def impatient(street: Street) -> Iterator[RemoteHouse]:
    """One that does not try again where fal is busy."""
    with street.live_server(timing=replace(QUICK, submit_s=0.0)) as live_server:
        yield live_server


def begin(live_server: RemoteHouse, body: dict[str, Any] = ASK, kind: str = "image") -> str:
    """A job on its way; its id."""
    return live_server.ask(kind, body, **ASYNC).json()["id"]


# What goes wrong

GONE = {"detail": "Path /sora-2 not found"}
POLICY = [{"loc": ["body", "prompt"], "msg": "not this", "type": "content_policy_violation", "url": "u"}]
TOO_SMALL = [{"loc": ["body", "image_size", "width"], "msg": "too small", "type": "greater_than", "url": "u"}]
THEIRS = [{"loc": ["body"], "msg": "broke", "type": "internal_server_error", "url": "u"}]
LOCKED = {"detail": "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."}


@pytest.mark.parametrize(
    ("where", "status", "body", "code", "answered", "says"),
    [
        ("submit", 401, {"detail": "No user found for Key ID"}, "REMOTE_KEY_REFUSED", 503, "refused this server's key"),
        ("submit", 403, {"detail": "Forbidden"}, "REMOTE_KEY_REFUSED", 503, "refused this server's key"),
        ("submit", 403, LOCKED, "REMOTE_BALANCE_EXHAUSTED", 503, "Exhausted balance"),
        ("submit", 404, GONE, "ENDPOINT_GONE", 410, "fal.ai no longer has fal-ai/flux-pro/v1.1 for Flux Pro"),
        ("result", 422, {"detail": POLICY}, "CONTENT_POLICY", 422, "Flux Pro refused the content: not this"),
        ("result", 422, {"detail": TOO_SMALL}, "INVALID_FOR_MODEL", 422, "aspectRatio: too small"),
        ("submit", 422, {"detail": TOO_SMALL}, "INVALID_FOR_MODEL", 422, "aspectRatio: too small"),
        ("result", 422, {"detail": THEIRS}, "REMOTE_FAILED", 502, "fal.ai failed: broke"),
        ("submit", 429, {"detail": "Too many requests"}, "REMOTE_BUSY", 503, "fal.ai is busy"),
        ("submit", 500, {"detail": "Internal", "error_type": "internal_error"}, "REMOTE_FAILED", 502, "with 500"),
        ("result", 503, {"detail": "x", "error_type": "runner_disconnected"}, "REMOTE_FAILED", 502, "with 503"),
        ("submit", 502, "<html>nginx</html>", "REMOTE_UNREACHABLE", 502, "answered 502"),
        ("result", 504, {"detail": "x", "error_type": "request_timeout"}, "GENERATION_TIMEOUT", 504, "out of time"),
        ("output", 404, "", "REMOTE_OUTPUT_LOST", 502, "could not be fetched"),
    ],
)
def test_what_goes_wrong_is_told_apart_and_refunded_once(
    impatient: RemoteHouse, where: str, status: int, body: Any, code: str, answered: int, says: str
):
    live_server = impatient
    live_server.fal.refuse(where, status, body, times=99)
    before = live_server.balance()
    answer = live_server.ask("image", ASK)
    assert (answer.status_code, answer.json()["code"]) == (answered, code), answer.text
    assert says in answer.json()["error"]
    assert (answer.json()["refunded"], answer.headers["x-credits-charged"]) == (4, "0")
    assert live_server.balance() == before
    assert live_server.entries(answer.json()["jobId"]) == ["charge", "refund"]
    assert len(live_server.fal.submitted) == (0 if where == "submit" else 1), "nothing is sent twice"


def test_a_refused_field_is_named_as_the_caller_knows_it(live_server: RemoteHouse):
    live_server.fal.refuse("result", 422, {"detail": TOO_SMALL})
    assert live_server.ask("image", ASK).json()["issues"] == [{"path": "aspectRatio", "message": "too small"}]


@pytest.mark.parametrize(
    ("model", "says", "retired"),
    [
        ("sora-2", "Sora 2 was retired on 2026-09-24.", {"date": "2026-09-24", "successor": None}),
        ("veo-3.1", "Veo 3.1 was retired on 2026-10-22. Its successor is google/gemini-omni-flash.",
         {"date": "2026-10-22", "successor": "google/gemini-omni-flash"}),
    ],
)  # fmt: skip
def test_a_retired_model_says_since_when_and_what_instead(
    live_server: RemoteHouse, model: str, says: str, retired: dict[str, Any]
):
    live_server.fal.refuse("submit", 404, GONE)
    answer = live_server.ask("video", {"prompt": "a", "model": model})
    assert (answer.status_code, answer.json()["error"]) == (410, says)
    assert answer.json()["retired"] == retired
    assert live_server.job(answer.json()["jobId"])["error"]["code"] == "ENDPOINT_GONE"


@pytest.mark.parametrize(
    "result",
    [
        {"images": []},
        {"images": [{"url": "http://169.254.169.254/latest"}]},
        {"images": [{"url": "data:image/png;base64,AAAA"}]},
        {"nothing": 1},
    ],
)
def test_an_output_that_is_none(live_server: RemoteHouse, result: dict[str, Any]):
    live_server.fal.result = result
    answer = live_server.ask("image", ASK)
    assert (answer.status_code, answer.json()["code"]) == (502, "REMOTE_OUTPUT_LOST")
    assert live_server.entries(answer.json()["jobId"]) == ["charge", "refund"]
    assert list(live_server.services.files.root.iterdir()) == []


def test_a_picture_made_black_is_a_refusal(live_server: RemoteHouse):
    live_server.fal.result |= {"has_nsfw_concepts": [True]}
    assert live_server.ask("image", ASK).json()["code"] == "CONTENT_POLICY"


def test_an_upload_that_is_refused(live_server: RemoteHouse):
    live_server.fal.refuse("upload", 500, {"detail": "no"})
    body = {"prompt": "a", "model": "recraft-v3", "imageUrl": data_url(PICTURE, "image/png")}
    assert live_server.ask("image", body).json()["code"] == "REMOTE_FAILED"
    assert not live_server.fal.submitted


def test_nobody_is_there(street: Street):
    nowhere = {"fal_queue_url": "http://127.0.0.1:9", "fal_rest_url": "http://127.0.0.1:9"}
    with street.live_server(**nowhere, timing=replace(QUICK, submit_s=0.0)) as live_server:
        answer = live_server.ask("image", ASK)
        assert (answer.status_code, answer.json()["code"]) == (502, "REMOTE_UNREACHABLE")
        assert live_server.entries(answer.json()["jobId"]) == ["charge", "refund"]


# What passes


def test_what_passes_is_waited_out(live_server: RemoteHouse):
    fal = live_server.fal
    fal.refuse("submit", 429, {"detail": "slow down"}, times=1)
    fal.refuse("status", 502, "<html>nginx</html>", times=2)
    fal.refuse("status", 429, {"detail": "slow down"}, times=1)
    fal.refuse("result", 503, "<html>nginx</html>", times=1)
    fal.refuse("output", 500, "", times=2)
    answer = live_server.ask("image", ASK)
    assert answer.status_code == 200, answer.text
    assert len(fal.submitted) == 1
    assert live_server.entries(answer.headers["x-job-id"]) == ["charge"]


def test_a_job_that_takes_too_long_is_cancelled_there_and_refunded(street: Street):
    with street.live_server(timing=RemoteTimeouts(poll_s=0.005, retry_s=0.005, deadline_s=0.05)) as live_server:
        live_server.fal.hold = True
        answer = live_server.ask("image", ASK)
        assert (answer.status_code, answer.json()["code"]) == (504, "GENERATION_TIMEOUT")
        assert live_server.fal.cancels == ["req-1"]
        assert live_server.entries(answer.json()["jobId"]) == ["charge", "refund"]


def test_progress_is_fals(live_server: RemoteHouse):
    live_server.fal.hold = True
    job_id = begin(live_server)
    waiting = live_server.until(lambda: live_server.job(job_id)["progress"])
    assert waiting == {"phase": "queued at fal", "step": 2, "steps": 0, "secondsLeft": None}
    said: list[Any] = []
    live_server.services.dispatcher.state.progress = Noting(said)
    live_server.fal.hold = False
    live_server.until(lambda: live_server.job(job_id)["status"] == "succeeded")
    assert [(each.phase, each.step, each.steps) for each in said] == [("running at fal", 14, 28)]


class Noting(dict[str, Any]):
    def __init__(self, said: list[Any]) -> None:
        super().__init__()
        self.said = said

    def __setitem__(self, key: str, value: Any) -> None:
        self.said.append(value)
        super().__setitem__(key, value)


# Cancel


def test_a_cancel_is_a_cancel_there(live_server: RemoteHouse):
    live_server.fal.hold = True
    before = live_server.balance()
    job_id = begin(live_server)
    live_server.until(lambda: live_server.fal.submitted and live_server.job(job_id)["progress"])
    assert live_server.client.post(f"/api/jobs/{job_id}/cancel").status_code in (200, 202)
    live_server.until(lambda: live_server.job(job_id)["status"] == "cancelled")
    assert live_server.fal.cancels == ["req-1"]
    assert live_server.balance() == before
    assert live_server.entries(job_id) == ["charge", "refund"]


def test_a_cancel_that_comes_too_late_changes_nothing(live_server: RemoteHouse):
    live_server.fal.hold = True
    live_server.fal.cancel_answer = (400, "ALREADY_COMPLETED")
    job_id = begin(live_server)
    live_server.until(lambda: live_server.job(job_id)["progress"])
    live_server.client.post(f"/api/jobs/{job_id}/cancel")
    live_server.until(lambda: live_server.job(job_id)["status"] == "succeeded")
    assert live_server.entries(job_id) == ["charge"]


def test_a_cancel_that_fal_does_not_hear_ends_the_job_here(live_server: RemoteHouse):
    live_server.fal.hold = True
    live_server.fal.refuse("cancel", 500, {"detail": "no"})
    job_id = begin(live_server)
    live_server.until(lambda: live_server.job(job_id)["progress"])
    live_server.client.post(f"/api/jobs/{job_id}/cancel")
    live_server.until(lambda: live_server.job(job_id)["status"] == "cancelled")


def test_a_cancel_while_it_is_handed_over(live_server: RemoteHouse):
    """It is brought to its id, so that it can be cancelled there too."""
    live_server.fal.hold = True
    live_server.fal.may_answer.clear()
    job_id = begin(live_server)
    live_server.until(live_server.fal.accepts.is_set)
    live_server.client.post(f"/api/jobs/{job_id}/cancel")
    live_server.fal.may_answer.set()
    live_server.until(lambda: live_server.job(job_id)["status"] == "cancelled")
    assert live_server.fal.cancels == ["req-1"]


# A server that ends


def test_a_restart_goes_on_from_the_request_id(street: Street):
    with street.live_server() as live_server:
        live_server.fal.hold = True
        job_id = begin(live_server)
        live_server.until(lambda: live_server.row(job_id).remote_request_id)
    street.fal.hold = False
    with street.live_server() as live_server:
        live_server.until(lambda: live_server.job(job_id)["status"] == "succeeded")
        assert len(live_server.fal.submitted) == 1
        assert live_server.entries(job_id) == ["charge"]
        assert live_server.read(live_server.job(job_id)["output"]["imageUrl"]) == picture()


def test_a_stopping_server_brings_what_it_sends_to_its_id(street: Street):
    with street.live_server() as live_server:
        live_server.fal.may_answer.clear()
        job_id = begin(live_server)
        live_server.until(live_server.fal.accepts.is_set)
        threading.Timer(0.1, live_server.fal.may_answer.set).start()
    with street.live_server() as live_server:
        live_server.until(lambda: live_server.job(job_id)["status"] == "succeeded")
        assert len(live_server.fal.submitted) == 1


def test_a_server_that_died_while_it_handed_over_does_not_send_it_again(street: Street):
    with street.live_server() as live_server:
        live_server.fal.hold = True
        job_id = begin(live_server)
        live_server.until(lambda: live_server.row(job_id).remote_request_id)
        forget = "UPDATE job SET remote_request_id = NULL"
        live_server.client.portal.call(
            live_server.services.database.call, live_server.services.database.db.execute, forget
        )
        live_server.client.portal.call(live_server.services.database.call, live_server.services.database.db.conn.commit)
    with street.live_server() as live_server:
        job = live_server.job(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "REMOTE_SUBMIT_UNKNOWN")
        assert live_server.entries(job_id) == ["charge", "refund"]
        assert len(live_server.fal.submitted) == 1


def test_a_job_that_was_not_yet_sent_is_sent_after_the_restart(street: Street):
    with street.live_server() as live_server:
        live_server.fal.hold = True
        job_id = begin(live_server)
        live_server.until(lambda: live_server.row(job_id).remote_request_id)
        back = "UPDATE job SET remote_request_id = NULL, status = 'queued', started_at = NULL"
        live_server.client.portal.call(
            live_server.services.database.call, live_server.services.database.db.execute, back
        )
        live_server.client.portal.call(live_server.services.database.call, live_server.services.database.db.conn.commit)
    street.fal.reset()
    street.fal.result = {"images": [{"url": street.fal.serves("made.png", picture())}]}
    with street.live_server() as live_server:
        live_server.until(lambda: live_server.job(job_id)["status"] == "succeeded")
        assert len(live_server.fal.submitted) == 1


def test_a_job_at_fal_without_a_key_to_go_on_with_is_refunded(street: Street):
    with street.live_server() as live_server:
        live_server.fal.hold = True
        job_id = begin(live_server)
        live_server.until(lambda: live_server.row(job_id).remote_request_id)
    with street.live_server(fal_key=None) as live_server:
        live_server.until(lambda: live_server.job(job_id)["status"] == "failed")
        assert live_server.job(job_id)["error"]["code"] == "REMOTE_UNAVAILABLE"


# Where it runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fal_key": None}, "no key for it is set"),
        ({"offline": True}, "this server is offline"),
        ({"route": "local-only"}, "is not connected to it"),
    ],
)
def test_without_a_way_to_fal_the_answer_is_an_immediate_503(street: Street, options: dict[str, Any], says: str):
    with street.live_server(**options) as live_server:
        answer = live_server.ask("image", ASK)
        assert (answer.status_code, answer.json()["code"]) == (503, "REMOTE_UNAVAILABLE")
        assert says in answer.json()["error"]
        assert live_server.client.get("/api/jobs").json()["jobs"] == []
        assert live_server.client.get("/api/credits/ledger").json()["entries"][0]["kind"] == "grant"
    assert not street.fal.submitted


def test_a_local_model_that_is_not_installed_runs_at_fal(live_server: RemoteHouse):
    answer = live_server.ask("image", {"prompt": "a", "model": "flux-schnell"})
    assert (answer.status_code, answer.headers["x-served-by"]) == (200, "fal")


def test_a_caller_may_keep_a_job_here(live_server: RemoteHouse):
    answer = live_server.ask("image", {"prompt": "a", "model": "flux-schnell"}, X_Route="local-only")
    assert (answer.status_code, answer.json()["code"]) == (503, "MODEL_NOT_INSTALLED")
    assert not live_server.fal.submitted


def test_without_a_key_a_local_model_says_how_to_install_it(street: Street):
    with street.live_server(fal_key=None) as live_server:
        answer = live_server.ask("image", {"prompt": "a", "model": "flux-schnell"})
        assert answer.json()["code"] == "MODEL_NOT_INSTALLED"


def test_a_caller_may_ask_for_fal_but_not_past_the_operator(live_server: RemoteHouse, street: Street, tmp_path: Path):
    body = {"imageUrl": data_url(PICTURE, "image/png")}
    live_server.fal.result = {"image": {"url": live_server.fal.serves("b.png", picture())}}
    assert live_server.ask("remove-bg", body, X_Route="remote-only").headers["x-served-by"] == "fal"
    assert live_server.ask("remove-bg", body, X_Route="elsewhere").json()["issues"][0]["path"] == "X-Route"
    with Street(tmp_path / "other", live_server.fal).live_server(route="local-only") as walled:
        answer = walled.ask("remove-bg", body, X_Route="remote-only")
        assert (answer.status_code, answer.json()["code"]) == (503, "REMOTE_UNAVAILABLE")


def test_fals_own_url_is_passed_through_where_the_operator_says_so(street: Street):
    with street.live_server(pass_through_urls=True) as live_server:
        answer = live_server.ask("image", ASK)
        assert answer.json() == {"imageUrl": f"{street.fal.url}/media/made.png", "seed": 3}
        name = live_server.row(answer.headers["x-job-id"]).output_name
        assert live_server.services.files.path(name).read_bytes() == picture(), "it is kept here all the same"


def test_the_key_is_neither_shown_nor_logged(street: Street, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    street.fal.refuse("submit", 401, {"detail": "no"})
    with street.live_server() as live_server:
        live_server.ask("image", ASK)
    assert KEY not in caplog.text
    assert KEY not in repr(street.settings())


def test_the_key_comes_from_either_variable():
    assert from_environment({"FAL_KEY": "a"})["fal_key"] == "a"
    assert from_environment({"FAL_KEY": "a", "PLANTAIN_FAL_KEY": "b"})["fal_key"] == "b"
    assert from_environment({"PLANTAIN_ROUTE": "remote-only"})["route"] == "remote-only"
    with pytest.raises(ValueError, match="is none of"):
        from_environment({"PLANTAIN_ROUTE": "away"})
    assert Settings().route == "prefer-local" and QUICK.poll_s < RemoteTimeouts().poll_s and FILM
