"""Demo weights: when they are used, how it is told, and what they make; on tiny random weights in their layout."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.base import UnusableWeights
from pipelines.catalog.catalog import WEIGHTS_TOML, Model
from pipelines.catalog.reader import load_catalog
from pipelines.catalog.table import CatalogError
from pipelines.weights.importer import import_folder
from pipelines.weights.installed import Installed
from pipelines.weights.pull import pull
from pipelines.weights.verify import verify_demo
from server import services
from server.cli.doctor import examine
from server.cli.main import app as cli
from server.cli.serve import _print_startup
from server.errors import ModelNotInstalled, PlantainError, RemoteUnavailable, UnsupportedWorkflow
from server.intake.routing import choose_route, local_run
from server.model_registry import ModelRegistry
from server.settings import PROJECT, Settings
from tests.api.test_video import video_url
from tests.support import demo
from tests.support.app import InProcessApp, serve_app
from tests.support.server import CPU, LiveServer, data_url, running
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import lora as tiny_lora
from tests.support.video_files import boxes, probe, write

IMAGES, VIDEOS = "/api/image/fal/generate", "/api/video/fal/generate"
FLUX = ["flux-schnell", "flux-dev", "flux-kontext"]
PICTURE = Image.linear_gradient("L").resize((160, 96)).convert("RGB")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return demo.install_test_models(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def mine(settings: Settings, tmp_path: Path) -> Settings:
    """A copy that a test may change."""
    shutil.copytree(settings.weights_toml.parent, tmp_path / "copy")
    return replace(settings, data=tmp_path / "data", weights_toml=tmp_path / "copy" / "weights.toml")


@pytest.fixture(scope="module")
def live_server(settings: Settings) -> Iterator[LiveServer]:
    """Its worker has one thread: networks this small gain nothing from more, and lose much on a busy machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        with running(settings) as server:
            server.until(lambda: server.client.get("/readyz").is_success)
            yield server


def shelf_of(settings: Settings) -> ModelRegistry:
    return ModelRegistry(load_catalog(settings.weights_toml), Installed(settings.weights, settings.demo))


def install(settings: Settings, folder: Path, model: str = "flux-dev") -> None:
    catalog = load_catalog(settings.weights_toml)
    tiny_flux.make_flux(folder, "dev")
    import_folder(folder, settings.weights, catalog, model=catalog.find(model), accept_licence=True)


def ask(live_server: LiveServer, model: str, **body: Any) -> httpx.Response:
    route = IMAGES if model in FLUX else VIDEOS
    return live_server.ask(route, {"prompt": "a red circle", "model": model, "seed": 5} | body)


def job_of(live_server: LiveServer, answer: httpx.Response) -> dict[str, Any]:
    return live_server.read(f"/api/jobs/{answer.headers['x-job-id']}")


# What it makes


@pytest.mark.parametrize("model", FLUX)
@pytest.mark.parametrize(("ratio", "size"), [(None, (256, 256)), ("16:9", (448, 256)), ("9:21", (256, 576))])
def test_pictures_of_its_own_sizes(live_server: LiveServer, model: str, ratio: str | None, size: tuple[int, int]):
    answer = ask(live_server, model, **({"aspectRatio": ratio} if ratio else {}))
    assert answer.status_code == 200, answer.text
    assert live_server.picture(answer.json()["imageUrl"]).size == size
    assert "x-ignored-fields" not in answer.headers
    assert job_of(live_server, answer)["params"]["numInferenceSteps"] == 8


@pytest.mark.parametrize("model", FLUX)
def test_pictures_from_pictures_keep_their_shape_at_its_own_area(live_server: LiveServer, model: str):
    answer = ask(live_server, model, imageUrl=data_url(PICTURE))
    assert live_server.picture(answer.json()["imageUrl"]).size == (320, 192)


def test_what_the_caller_may_set_is_what_the_model_lets_them_set(live_server: LiveServer):
    answer = ask(live_server, "flux-schnell", numInferenceSteps=2, guidanceScale=3.0)
    assert job_of(live_server, answer)["params"]["numInferenceSteps"] == 2
    assert answer.headers["x-ignored-fields"] == "guidanceScale"
    refused = ask(live_server, "flux-schnell", aspectRatio="2:1")
    assert (refused.status_code, refused.json()["code"]) == (400, "UNSUPPORTED_ASPECT_RATIO")


def test_kontext_edits_several_pictures_on_the_weights_that_the_others_make_them_with(live_server: LiveServer):
    """Which image-to-image of Flux cannot: it is Kontext's own recipe."""
    pictures = [data_url(PICTURE), data_url(PICTURE.rotate(180))]
    answer = ask(live_server, "flux-kontext", imageUrls=pictures, numInferenceSteps=1)
    assert answer.status_code == 200, answer.text
    refused = ask(live_server, "flux-dev", imageUrls=pictures, numInferenceSteps=1)
    assert refused.json()["code"] == "INVALID_MEDIA"


def test_the_models_of_a_family_share_one_copy(live_server: LiveServer):
    for model in ("flux-dev", "flux-schnell", "flux-kontext"):
        assert ask(live_server, model, numInferenceSteps=1).status_code == 200
    [device] = live_server.read("/api/admin/devices")["devices"]
    held = [(each["name"], each["models"]) for each in device["components"] if "flux-dev" in each["models"]]
    assert sorted(name for name, _ in held) == sorted(tiny_flux.FLUX_COMPONENTS)
    assert all({*FLUX} <= {*models} for _, models in held)


@pytest.mark.parametrize(
    ("model", "body", "size", "duration"),
    [
        ("wan-2.1", {}, (224, 128), 33 / 16),
        ("wan-2.1", {"aspectRatio": "1:1", "resolution": "720p", "duration": 0.5}, (128, 128), 9 / 16),
        ("wan-2.1-i2v-14b-720p", {"imageUrl": data_url(PICTURE), "duration": 0.5}, (224, 128), 9 / 16),
        ("ltx-video", {"aspectRatio": "1:1"}, (128, 128), 25 / 12),
    ],
)
def test_clips_of_its_own_sizes_and_length(
    live_server: LiveServer, model: str, body: dict[str, Any], size: tuple[int, int], duration: float
):
    answer = ask(live_server, model, **body)
    assert answer.status_code == 200, answer.text
    seen = probe(live_server.services.files.root / answer.json()["videoUrl"].rpartition("/")[2])
    assert seen.size == size
    assert answer.json()["duration"] == pytest.approx(duration, abs=1e-3)
    params = job_of(live_server, answer)["params"]
    usual = (12, 3.0, "") if model == "ltx-video" else (8, 2.0, "")
    assert (params["numInferenceSteps"], params["guidanceScale"], params["negativePrompt"]) == usual


def test_all_that_wan_does(live_server: LiveServer, tmp_path: Path):
    """Whichever variant it stands for: one network does it all."""
    footage = write(tmp_path / "in.mp4", boxes(20, 64, 48), 16)
    pictures = {"imageUrls": [data_url(PICTURE)], "workflow": "reference-to-video"}
    for body in (pictures, {"videoUrl": video_url(footage)}):
        answer = ask(live_server, "wan-2.1", numInferenceSteps=1, duration=0.5, aspectRatio="1:1", **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-weights"] == "demo"


# How it is told


def test_the_models_list_tells(live_server: LiveServer):
    models = {model["id"]: model for model in live_server.read("/api/models")["models"]}
    told = {name for name, model in models.items() if model["weights"] == "demo"}
    here = {
        name for name, model in models.items() if name.startswith(("flux", "wan", "ltx")) and model["runsOn"] != "fal"
    }
    assert told == here and {*FLUX, "wan-2.1", "wan-2.1-vace-14b", "ltx-video"} <= told
    assert models["flux-pro"]["weights"] == "none" and models["u2net"]["weights"] == "missing"


def test_answers_and_jobs_tell(live_server: LiveServer):
    answer = ask(live_server, "flux-dev", numInferenceSteps=1)
    assert (answer.headers["x-weights"], answer.headers["x-served-by"]) == ("demo", "local")
    looked = live_server.client.get(f"/api/jobs/{answer.headers['x-job-id']}")
    assert (looked.headers["x-weights"], looked.json()["weights"], looked.json()["model"]) == (
        "demo",
        "demo",
        "flux-dev",
    )
    accepted = live_server.ask(
        IMAGES, {"prompt": "a", "model": "flux-dev", "numInferenceSteps": 1}, Prefer="respond-async"
    )
    assert (accepted.status_code, accepted.headers["x-weights"], accepted.json()["weights"]) == (202, "demo", "demo")
    assert {job["weights"] for job in live_server.read("/api/jobs")["jobs"]} == {"demo"}


def test_the_start_tells(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = services.build_services(replace(settings, data=tmp_path), [CPU])
    _print_startup(settings, made)
    made.database.close()
    line = next(line for line in capsys.readouterr().out.splitlines() if "demo" in line)
    assert all(name in line for name in (*FLUX, "wan-2.1,", "ltx-video")) and "u2net" not in line
    assert "plantain pull MODEL" in line and "--no-demo" in line


def test_the_commands_tell(mine: Settings, tmp_path: Path):
    words = ["models", "--data", str(mine.data), "--weights-toml", str(mine.weights_toml)]
    row = next(line for line in CliRunner().invoke(cli, words).output.splitlines() if line.startswith("flux-dev "))
    assert "demo" in row.split()
    assert " demo " not in CliRunner().invoke(cli, [*words, "--no-demo"]).output
    found = [each.text for each in examine(mine, load_catalog(mine.weights_toml), [CPU]) if each.subject == "weights"]
    assert "ltx-video runs on demo weights; the real ones: plantain pull ltx-video" in found
    install(mine, tmp_path / "dev")
    found = [each.text for each in examine(mine, load_catalog(mine.weights_toml), [CPU]) if each.subject == "weights"]
    assert any(text.startswith("flux-dev is installed") for text in found)


# When it is used


def refuse() -> None:
    raise RemoteUnavailable("There is no key.")


FAL: Any = SimpleNamespace(connected=True, check=lambda: None)
NO_FAL: Any = SimpleNamespace(connected=False, check=refuse)


def destination(model: Model, workflow: str, route: Any, registry: ModelRegistry, remote: Any) -> str:
    return choose_route(model, workflow, route, local_run(model, workflow, registry, None), remote)


def test_own_weights_come_first_then_fal_then_the_demo(mine: Settings, tmp_path: Path):
    install(mine, tmp_path / "dev")
    shelf = shelf_of(mine)
    places = {
        (model, route, desk is FAL): destination(shelf.find(model), "text-to-image", route, shelf, desk)
        for model in ("flux-dev", "flux-schnell")
        for route in ("prefer-local", "local-only")
        for desk in (FAL, NO_FAL)
    }
    elsewhere = {each for each, place in places.items() if place == "remote"}
    assert elsewhere == {("flux-schnell", "prefer-local", True)}
    assert (shelf.demo(shelf.find("flux-dev")), shelf.demo(shelf.find("flux-schnell")) is None) == (None, False)


def test_what_fal_does_not_do_runs_on_the_demo(settings: Settings):
    shelf, desk = shelf_of(settings), FAL
    assert destination(shelf.find("flux-schnell"), "image-to-image", "prefer-local", shelf, desk) == "local"
    assert destination(shelf.find("wan-2.1"), "extend", "prefer-local", shelf, desk) == "local"
    assert destination(shelf.find("wan-2.1"), "text-to-video", "prefer-local", shelf, desk) == "remote"
    assert destination(shelf.find("wan-2.1"), "lip-sync", "prefer-local", shelf, desk) == "remote"


@pytest.mark.parametrize(
    ("model", "workflow", "route", "error"),
    [
        ("flux-dev", "text-to-image", "remote-only", RemoteUnavailable),
        ("wan-2.1", "lip-sync", "local-only", UnsupportedWorkflow),
        ("u2net", "remove-bg", "prefer-local", ModelNotInstalled),
    ],
)
def test_what_it_is_not_for(settings: Settings, model: str, workflow: str, route: Any, error: type[PlantainError]):
    shelf, desk = shelf_of(settings), NO_FAL
    with pytest.raises(error):
        destination(shelf.find(model), workflow, route, shelf, desk)


def test_turned_off_the_model_is_not_installed(settings: Settings):
    shelf = shelf_of(replace(settings, demo=False))
    with pytest.raises(ModelNotInstalled, match="plantain pull flux-dev"):
        destination(shelf.find("flux-dev"), "text-to-image", "prefer-local", shelf, NO_FAL)
    assert shelf.on_demo() == [] and shelf.families() == []


def test_it_does_not_hide_that_installed_weights_are_damaged(mine: Settings, tmp_path: Path):
    install(mine, tmp_path / "dev")
    (mine.weights / "flux-dev" / "model_index.json").unlink()
    shelf = shelf_of(mine)
    assert shelf.installed.status(shelf.find("flux-dev")) == "missing"
    with pytest.raises(ModelNotInstalled):
        destination(shelf.find("flux-dev"), "text-to-image", "prefer-local", shelf, NO_FAL)


def test_wan_itself_picks_an_installed_variant_before_the_demo(settings: Settings):
    shelf = shelf_of(settings)
    wan = shelf.find("wan-2.1")
    assert shelf.installed.status(wan) == "demo"
    for workflow in wan.variants:
        assert shelf.demo(shelf.chosen(wan, workflow)), workflow
    assert shelf.chosen(wan, "text-to-video", "720p").id == "wan-2.1-vace-14b"


# Jobs keep to what they were planned with


def tell(settings: Settings, story: Any) -> Any:
    async def run() -> Any:
        async with serve_app(settings) as app:
            return await story(app)

    return asyncio.run(run())


async def queue_two(app: InProcessApp) -> list[str]:
    """One job that runs, one that waits behind it."""
    owner = app.owner()
    answers = [await owner.make("hold", "flux-dev", Prefer="respond-async") for _ in range(2)]
    await app.settle()
    return [answer.json()["id"] for answer in answers]


def test_after_a_restart_they_run_on_it_still_and_the_next_one_on_what_was_installed(mine: Settings, tmp_path: Path):
    ids = tell(mine, queue_two)
    install(mine, tmp_path / "dev")

    async def again(app: InProcessApp) -> list[tuple[str, str]]:
        answer = await app.owner().make("hold", "flux-dev", Prefer="respond-async")
        assert (answer.json()["weights"], "x-weights" in answer.headers) == ("installed", False)
        ids.append(answer.json()["id"])
        ran = []
        for _ in ids:
            await app.settle()
            [run] = app.workers[0].held
            ran.append((run.job_id, run.weights.model))
            app.release(holds=True)
        return ran

    assert tell(mine, again) == list(zip(ids, ["flux-dev+demo", "flux-dev+demo", "flux-dev"], strict=True))


def test_without_it_they_fail_and_are_refunded(mine: Settings):
    ids = tell(mine, queue_two)

    async def again(app: InProcessApp) -> None:
        for job_id in ids:
            job = await app.owner().read(f"/api/jobs/{job_id}")
            assert (job["status"], job["error"]["code"]) == ("failed", "MODEL_NOT_INSTALLED")
        kinds = [row["kind"] for row in app.rows("SELECT kind FROM ledger WHERE job_id = ? ORDER BY id", ids[1])]
        assert kinds == ["charge", "refund"]

    tell(replace(mine, demo=False), again)


def test_what_it_takes_is_learned_apart_from_the_model(mine: Settings):
    async def story(app: InProcessApp) -> list[str]:
        await app.owner().make("work", "flux-dev")
        return [row["model"] for row in app.rows("SELECT model FROM timing")]

    assert tell(mine, story) == ["flux-dev+demo"]


def test_a_lora_is_not_worn_by_it(mine: Settings):
    with mine.weights_toml.open("a") as file:
        file.write('[models.flux-dev.loras.sketch]\nsource = "path"\npath = "sketch.safetensors"\n')
    mine.weights.mkdir(parents=True)
    tiny_lora.make_flux_lora(mine.weights / "sketch.safetensors", seed=1)
    pull(load_catalog(mine.weights_toml).find_weights("flux-dev+sketch"), mine.weights, accept_licence=True)

    async def story(app: InProcessApp) -> httpx.Response:
        return await app.owner().ask(IMAGES, {"prompt": "work", "model": "flux-dev", "loras": [{"id": "sketch"}]})

    answer = tell(mine, story)
    assert (answer.status_code, answer.json()["code"]) == (503, "MODEL_NOT_INSTALLED")


# Damage


def damage_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def damage_missing(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()


def damage_truncated(folder: Path) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (damage_sums, "has no SHA256SUMS"),
        (damage_missing, "scheduler_config.json is missing"),
        (damage_truncated, "and its header promises"),
    ],
)
def test_damaged_ones_keep_the_server_from_starting_and_doctor_tells(mine: Settings, harm: Any, text: str):
    harm(mine.weights_toml.parent / "weights" / "demo" / "wan")
    with pytest.raises(UnusableWeights, match=text):
        services.build_services(mine, [CPU])
    services.build_services(replace(mine, demo=False), [CPU]).database.close()
    bad = [each.text for each in examine(mine, load_catalog(mine.weights_toml), [CPU]) if each.state == "bad"]
    assert len(bad) == 1 and text in bad[0]
    environment = {"PLANTAIN_WEIGHTS_TOML": str(mine.weights_toml), "PLANTAIN_OFFLINE": "1"}
    result = CliRunner().invoke(cli, ["serve", "--data", str(mine.data)], env=environment)
    assert result.exit_code == 1 and text in result.output.replace("\n", " ")


def test_verify_reads_them_again(mine: Settings):
    words = ["verify", "--data", str(mine.data), "--weights-toml", str(mine.weights_toml)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    file = mine.weights_toml.parent / "weights/demo/flux/vae/config.json"
    file.write_text(file.read_text() + "\n")
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1 and "demo flux:" in result.output and "hash is wrong" in result.output


def test_those_that_come_with_the_program_are_whole():
    assert verify_demo(load_catalog(), lambda *_: None) == []


# The catalogue


def test_a_family_whose_folder_is_not_there_has_none(mine: Settings):
    shutil.rmtree(mine.weights_toml.parent / "weights" / "demo" / "wan")
    shelf = shelf_of(mine)
    assert {name.split("-")[0] for name in shelf.on_demo()} == {"flux", "ltx"} == {*shelf.families()}


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('path = "weights/demo/flux"\n', "", "[demo.flux] for flux-schnell: path is missing"),
        ("[demo.ltx]\n", "[demo.ltx]\nlicence = 'MIT'\n", "[demo.ltx]: licence is not known"),
        ("[demo.flux]\n", "[demo.flax]\npath = 'x'\n[demo.flux]\n", "[demo.flax]: no model with weights is of this"),
        ('"5:4" = [320, 256]\n', "", "[demo.flux] for flux-schnell: sizes has other aspect ratios than the model"),
        ('"5:4" = [320, 256]\n', '"5:4" = [320, 257]\n', "[demo.flux] for flux-schnell: sizes.5:4 is not a multiple"),
        ("demo = { arch", "demo = { ark", "[models.flux-kontext]: demo: arkitecture is not known; did you mean arch"),
    ],
)
def test_what_the_catalogue_cannot_mean_is_refused(tmp_path: Path, old: str, new: str, error: str):
    text = WEIGHTS_TOML.read_text()
    assert old in text
    (tmp_path / "weights.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(CatalogError) as refused:
        load_catalog(tmp_path / "weights.toml")
    assert str(refused.value).removeprefix(f"{tmp_path / 'weights.toml'}: ").startswith(error)


def test_sums_are_those_of_sha256sum(mine: Settings):
    folder = mine.weights_toml.parent / "weights" / "demo" / "ltx"
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    assert (PROJECT / "scripts/sums").is_file()
