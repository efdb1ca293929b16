"""Memory in a whole server: tiers by budget, tries after running out, bad luck with files and workers, the books."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.catalog.reader import load_catalog
from pipelines.weights.installed import Installed
from pipelines.weights.pull import pull
from server.cli.main import app
from server.scheduling.need import Shape, need_of
from server.settings import Settings
from server.workers.devices import DeviceSpec
from server.workers.protocol import Evict
from tests.support.app import serve_app
from tests.support.server import GENERATE, LiveServer, running
from tests.support.tiny import flux as tiny_flux

MODEL = """
[models.hungry-{kind}]
name = "Hungry {kind}"
kind = "image"
family = "tests.families.memory_hungry"
dtype = "bfloat16"
workflows = ["text-to-image"]
credits = {{ base = 2 }}
licence = "none"
sizes = {{ "1:1" = [64, 64] }}
size_multiple = 16
defaults = {{ num_inference_steps = 2, guidance_scale = 3.5 }}
weights = {{ source = "path", path = "{folder}" }}

[models.hungry-{kind}.working]
encode = {{ components = ["text_encoder", "text_encoder_2"], fixed_bytes = 1000 }}
denoise = {{ components = ["transformer"], fixed_bytes = 1000 }}
decode = {{ components = ["vae"], fixed_bytes = 1000, tiled_bytes = 500 }}
"""


def install_test_models(folder: Path, *kinds: tiny_flux.FluxKind, larger: tuple[str, ...] = ()) -> Settings:
    """A data folder with these models, their transformers of seven blocks, installed in place.

    The `larger` have each one block more than the one before.
    """
    made: dict[str, Path] = {
        kind: tiny_flux.make_flux(folder / "made" / f"flux-{kind}", kind, single_layers=6) for kind in kinds
    }
    for layers, name in enumerate(larger, 7):
        made[name] = tiny_flux.make_flux(folder / "made" / f"flux-{name}", "dev", single_layers=layers)
    toml = folder / "weights.toml"
    toml.write_text("".join(MODEL.format(kind=kind, folder=path) for kind, path in made.items()))
    settings = Settings(data=folder / "data", weights_toml=toml)
    for model in load_catalog(toml).models.values():
        pull(model, settings.weights)
    return settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return install_test_models(tmp_path_factory.mktemp("memory"), "dev", "schnell")


@pytest.fixture(scope="module")
def live_server(settings: Settings) -> Iterator[LiveServer]:
    with running(settings) as made:
        yield made


def cpu(budget_bytes: int) -> list[DeviceSpec]:
    return [DeviceSpec("cpu", "CPU", "cpu", 2 * budget_bytes, budget_bytes)]


def need_bytes(settings: Settings, tier: int) -> int:
    model = load_catalog(settings.weights_toml).models["hungry-dev"]
    weights = Installed(settings.weights).weights(model)
    assert weights
    need = need_of(weights, model.working, Shape(64 * 64))
    return need.bytes_in(need.possible[tier])


def generate(live_server: LiveServer, prompt: str, model: str = "hungry-dev", seed: int = 1) -> Any:
    return live_server.ask(GENERATE, {"prompt": prompt, "model": model, "seed": seed})


@pytest.fixture
def forgetful(live_server: LiveServer) -> None:
    """What failed before is tried again: a model begins no second time in a way that failed twice."""
    live_server.services.dispatcher.state.memory.peaks._by_model.clear()


def device(live_server: LiveServer) -> dict[str, Any]:
    return live_server.read("/api/admin/devices")["devices"][0]


def rungs(live_server: LiveServer) -> list[tuple[str, str | None]]:
    """Of the last job, in order: the way that failed, and the next."""
    found = device(live_server)["oomAttempts"]
    return [(each["mode"], each["nextMode"]) for each in found if each["jobId"] == found[0]["jobId"]][::-1]


def test_a_run_keeps_its_components_and_the_device_tells_of_them(live_server: LiveServer):
    assert generate(live_server, "a red circle").status_code == 200
    there = live_server.until(
        lambda: (state := device(live_server))["status"] == "idle" and state["components"] and state
    )
    assert {each["name"] for each in there["components"]} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert sum(each["bytes"] for each in there["components"]) == there["residentBytes"] > 0
    shared = {each["name"]: each["models"] for each in there["components"]}
    assert shared["vae"] == ["hungry-dev", "hungry-schnell"]
    assert shared["transformer"] == ["hungry-dev"]
    assert there["budgetBytes"] > there["residentBytes"] and there["hostBudgetBytes"] is None


def test_devices_are_for_admins(live_server: LiveServer):
    assert live_server.client.get("/api/admin/devices", headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    ("way", "failed"),
    [
        ("resident, tiled", ["resident", "resident"]),
        ("staged", ["resident", "resident", "resident, tiled"]),
        ("streamed", ["resident", "resident", "resident, tiled", "staged", "staged, tiled"]),
    ],
)
def test_a_job_that_runs_out_goes_down_the_ladder_and_ends_well(
    live_server: LiveServer, forgetful: None, way: str, failed: list[str]
):
    answer = generate(live_server, f"only {way}")
    assert answer.status_code == 200, answer.text
    assert [step[0] for step in rungs(live_server)] == failed
    assert rungs(live_server)[-1][1] == way
    assert live_server.read("/api/jobs")["jobs"][0]["status"] == "succeeded"
    last = device(live_server)["oomAttempts"][0]
    if way != "resident, tiled":
        assert generate(live_server, f"only {way}").status_code == 200
        assert device(live_server)["oomAttempts"][0] == last, "the next one begins where this one ended"


def test_an_app_that_is_made_again_does_not_try_first_what_ran_out(tmp_path: Path):
    """The same as the next test, without worker processes."""
    settings = install_test_models(tmp_path, "dev")

    async def generated(prompt: str, device: DeviceSpec) -> list[str]:
        """The ways that have failed in all, in order."""
        async with serve_app(settings, device=device) as it:
            owner = it.owner()
            answer = await owner.make(prompt, "hungry-dev")
            assert answer.status_code == 200, answer.text
            failed = (await owner.read("/api/admin/devices"))["devices"][0]["oomAttempts"]
            return [each["mode"] for each in reversed(failed)]

    [small], [large] = cpu(6 * 2**30), cpu(9 * 2**30)
    failed = asyncio.run(generated("only staged", small))
    assert failed == ["resident", "resident", "resident, tiled"]
    assert asyncio.run(generated("only staged", small)) == failed
    assert asyncio.run(generated("only resident", large)) == failed, "it is tried where there is more to give out"


@pytest.mark.slow
def test_what_ran_out_is_not_tried_first_again_after_a_restart(tmp_path: Path):
    settings = install_test_models(tmp_path, "dev")
    with running(settings) as first:
        assert generate(first, "only staged").status_code == 200
        assert [step[0] for step in rungs(first)] == ["resident", "resident", "resident, tiled"]
    with running(settings) as second:
        before = device(second)["oomAttempts"]
        assert generate(second, "only staged").status_code == 200
        assert device(second)["oomAttempts"] == before
    with running(settings, cpu(9 * 2**30)) as larger:
        assert generate(larger, "only resident").status_code == 200, "it is tried where there is more to give out"
        assert device(larger)["oomAttempts"] == before


def test_a_job_that_fits_in_no_way_fails_is_refunded_and_the_next_one_runs(live_server: LiveServer, forgetful: None):
    before = live_server.balance()
    answer = generate(live_server, "never")
    assert answer.status_code == 500 and answer.json()["code"] == "OUT_OF_MEMORY"
    assert "Tried: resident on cpu; resident, tiled on cpu; staged on cpu" in answer.json()["error"]
    assert rungs(live_server)[-1] == ("streamed, tiled", None)
    assert live_server.balance() == before
    assert generate(live_server, "a red circle").status_code == 200
    there = live_server.until(
        lambda: (state := device(live_server))["status"] == "idle" and state["components"] and state
    )
    assert sum(each["bytes"] for each in there["components"]) == there["residentBytes"]


def test_a_worker_killed_while_it_loads_leaves_right_books_and_the_job_runs(live_server: LiveServer, tmp_path: Path):
    assert generate(live_server, f"die {tmp_path / 'flag'}", "hungry-schnell").status_code == 200
    there = live_server.until(
        lambda: (state := device(live_server))["status"] == "idle" and state["components"] and state
    )
    assert sum(each["bytes"] for each in there["components"]) == there["residentBytes"]


def test_nan_is_no_picture_and_the_next_run_is_as_ever(live_server: LiveServer, forgetful: None):
    expected = live_server.picture(generate(live_server, "a red circle").json()["imageUrl"]).tobytes()
    before = live_server.balance()
    assert generate(live_server, "nan").status_code == 500
    assert live_server.balance() == before
    assert live_server.picture(generate(live_server, "a red circle").json()["imageUrl"]).tobytes() == expected


def test_peaks_are_kept_and_shown(live_server: LiveServer, forgetful: None, settings: Settings):
    assert generate(live_server, "only resident, tiled", "hungry-schnell").status_code == 200, (
        "it ran out of memory first"
    )
    assert generate(live_server, "a prompt of its own").status_code == 200, "which has to be encoded"
    live_server.until(lambda: "text_encoder_2" in {each["name"] for each in device(live_server)["components"]})
    told = CliRunner().invoke(app, ["models", "--memory", "--json", *where(settings)])
    assert told.exit_code == 0, told.output
    assert '"measured": "0.' in told.output
    told = CliRunner().invoke(app, ["devices", *where(settings)], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert "text_encoder_2" in told.output and "hungry-dev, hungry-schnell" in told.output
    assert "ran out of memory" in told.output


def where(settings: Settings) -> list[str]:
    return ["--data", str(settings.data), "--weights-toml", str(settings.weights_toml)]


@pytest.fixture
def give(live_server: LiveServer) -> Iterator[Callable[[int], None]]:
    """Gives the device another budget, with nothing resident; afterwards it has its own again."""
    worker = live_server.services.dispatcher.state.workers["cpu"]
    kept = worker.budget_bytes

    def give(budget_bytes: int) -> None:
        live_server.until(lambda: worker.status == "idle")
        for key in dict(worker.resident):
            worker.remove({key})
            worker.supervisor.send(Evict(key))
        worker.budget_bytes = budget_bytes

    yield give
    give(kept)


@pytest.mark.parametrize(("tier", "way"), [(0, "resident"), (1, "staged"), (2, "streamed")])
def test_a_devices_budget_decides_the_tier_and_not_the_picture(
    live_server: LiveServer, forgetful: None, settings: Settings, give: Callable[[int], None], tier: int, way: str
):
    expected = live_server.picture(generate(live_server, "a red circle").json()["imageUrl"]).tobytes()
    give(need_bytes(settings, tier))
    answer = generate(live_server, "a red circle")
    assert answer.status_code == 200, answer.text
    assert live_server.picture(answer.json()["imageUrl"]).tobytes() == expected
    assert {each.way.tier for each in live_server.services.dispatcher.state.memory.peaks.of("hungry-dev")} >= {way}


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "way"), [(0, "resident"), (1, "staged"), (2, "streamed")])
def test_a_budget_decides_the_tier_and_not_the_picture(
    live_server: LiveServer, forgetful: None, tmp_path: Path, tier: int, way: str
):
    settings = install_test_models(tmp_path, "dev")
    expected = live_server.picture(generate(live_server, "a red circle").json()["imageUrl"]).tobytes()
    with running(settings, cpu(need_bytes(settings, tier))) as small:
        answer = generate(small, "a red circle")
        assert answer.status_code == 200, answer.text
        assert small.picture(answer.json()["imageUrl"]).tobytes() == expected
        told = small.services.dispatcher.state.memory.peaks.of("hungry-dev")
        assert {each.way.tier for each in told} >= {way}


def test_a_budget_too_small_for_any_way_is_refused_with_the_numbers(tmp_path: Path):
    settings = install_test_models(tmp_path, "dev")
    [small] = cpu(need_bytes(settings, 2) // 2)

    async def tell() -> None:
        async with serve_app(settings, device=small) as it:
            owner = it.owner()
            before = await owner.balance()
            answer = await owner.make("a red circle", "hungry-dev")
            assert (answer.status_code, answer.json()["code"]) == (503, "DOES_NOT_FIT")
            assert "GiB; the largest device here has" in answer.json()["error"]
            assert await owner.balance() == before

    asyncio.run(tell())


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def swap(file: Path) -> None:
    """Another file of the same size under the same name."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


HARMS = [truncate, swap, remove]


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Path]]:
    """A server with a model for each harm, and where the weights lie."""
    folder = tmp_path_factory.mktemp("harmed")
    with running(install_test_models(folder, "schnell", larger=tuple(harm.__name__ for harm in HARMS))) as made:
        yield made, folder / "made"


@pytest.mark.parametrize("harm", HARMS)
def test_weights_harmed_while_the_server_runs_are_not_used_and_others_are(
    harmed: tuple[LiveServer, Path], harm: Callable[[Path], None]
):
    it, made = harmed
    model = f"hungry-{harm.__name__}"
    before = it.balance()
    assert {each["id"]: each["weights"] for each in it.read("/api/models")["models"]}[model] == "installed"
    assert generate(it, "a red circle", "hungry-schnell").status_code == 200
    it.services.registry.runnable(model, 64 * 64)
    harm(made / f"flux-{harm.__name__}" / "transformer" / "diffusion_pytorch_model.safetensors")
    answer = generate(it, "a red circle", model)
    assert answer.status_code in (409, 500, 503), answer.text
    assert answer.json()["code"] in ("MODEL_NOT_INSTALLED", "WEIGHTS_UNUSABLE"), answer.text
    assert it.balance() == before - 2
    assert generate(it, "a red circle", "hungry-schnell").status_code == 200
