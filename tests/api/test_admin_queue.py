"""The queue over HTTP: what callers see, and what admins may change."""

from typing import Any

from server.timestamps import iso
from tests.support.app import GENERATE, NOW, ApiUser, InProcessApp, app_test


async def send(who: ApiUser, method: str, path: str, body: Any = None) -> Any:
    answer = await who.call(method, f"/api/admin{path}", body)
    assert answer.is_success, answer.text
    return answer.json()


async def wait_in_line(who: ApiUser, prompt: str = "hold") -> str:
    answer = await who.ask(GENERATE, {"prompt": prompt, "model": "plain"}, Prefer="respond-async")
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


@app_test()
async def test_a_caller_sees_position_reason_start_and_remaining_seconds(app: InProcessApp):
    ada = app.create_user(credits=9)
    first, second = await wait_in_line(ada), await wait_in_line(ada)
    await app.settle()
    running, waiting = await ada.read(f"/api/jobs/{first}"), await ada.read(f"/api/jobs/{second}")
    assert (running["status"], running["queue"]) == ("running", None)
    assert waiting["queue"] == {
        "position": 1,
        "reason": "needs 0.0 GiB; the CPU has 6.0 GiB in about 10 s",
        "expectedStartAt": iso(NOW + 10),
    }


@app_test()
async def test_an_admin_sees_the_queue_and_the_start_prediction_error(app: InProcessApp):
    ada = app.create_user(credits=9)
    first, second = await wait_in_line(ada), await wait_in_line(ada)
    await app.settle()
    queue = await send(app.owner(), "GET", "/queue")
    assert (queue["paused"], queue["waiting"], queue["startPredictionError"]["jobs"]) == (False, 1, 1)
    assert queue["devices"][0] | {"secondsLeft": None} == {
        "id": "cpu",
        "status": "loading",
        "drained": False,
        "jobId": first,
        "userId": ada.id,
        "secondsLeft": None,
    }
    assert [(job["id"], job["userId"], job["position"]) for job in queue["jobs"]] == [(second, ada.id, 1)]


@app_test()
async def test_an_admin_pauses_and_resumes(app: InProcessApp):
    ada, owner = app.create_user(credits=9), app.owner()
    assert await send(owner, "POST", "/queue/pause") == {"halted": ["queue"]}
    job_id = await wait_in_line(ada, "work")
    assert (await ada.read(f"/api/jobs/{job_id}"))["queue"]["reason"] == "the queue is paused"
    assert await send(owner, "POST", "/queue/resume") == {"halted": []}
    await app.settle()
    assert (await ada.read(f"/api/jobs/{job_id}"))["status"] == "succeeded"
    entries = (await owner.read("/api/admin/audit"))["entries"]
    assert [entry["action"] for entry in entries] == ["queue.resume", "queue.pause"]


@app_test()
async def test_an_admin_drains_a_device(app: InProcessApp):
    ada, owner = app.create_user(credits=9), app.owner()
    assert await send(owner, "POST", "/devices/cpu/drain") == {"halted": ["cpu"]}
    job_id = await wait_in_line(ada, "work")
    await app.settle()
    assert (await ada.read(f"/api/jobs/{job_id}"))["status"] == "queued"
    assert (await owner.call("POST", "/api/admin/devices/gpu7/drain")).status_code == 404
    await send(owner, "POST", "/devices/cpu/resume")
    await app.settle()
    assert (await ada.read(f"/api/jobs/{job_id}"))["status"] == "succeeded"


@app_test()
async def test_an_admin_sets_priorities(app: InProcessApp):
    ada, owner = app.create_user(credits=9), app.owner()
    first, second, third = [await wait_in_line(ada) for _ in range(3)]
    await app.settle()
    assert (await send(owner, "POST", f"/jobs/{third}/front"))["priority"] == 1000
    assert (await ada.read(f"/api/jobs/{third}"))["queue"]["position"] == 1
    await send(owner, "POST", f"/jobs/{third}/priority", {"priority": -1})
    assert (await ada.read(f"/api/jobs/{second}"))["queue"]["position"] == 1
    assert (await owner.call("POST", f"/api/admin/jobs/{first}/front")).status_code == 404, "it runs"
    assert (await ada.call("POST", f"/api/admin/jobs/{third}/front")).status_code == 403


@app_test(max_queued_each=1)
async def test_too_many_waiting_jobs_get_a_retry_after(app: InProcessApp):
    ada = app.create_user(credits=9)
    await wait_in_line(ada)
    await app.settle()
    await wait_in_line(ada)
    await app.settle()
    refused = await ada.ask(GENERATE, {"prompt": "hold", "model": "plain"})
    assert (refused.status_code, refused.json()["code"]) == (429, "CONCURRENCY_LIMIT")
    assert int(refused.headers["Retry-After"]) >= 5
