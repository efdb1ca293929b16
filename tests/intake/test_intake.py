"""What becomes of a request's input files when it is refused, and when it breaks off."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.params import RemoveBackgroundOf
from server import services
from server.accounts import users
from server.accounts.users import Caller
from server.errors import QueueFull
from server.intake.intake import GenerationRequest
from server.services import Services
from server.settings import Settings
from tests.support.server import CPU, data_url

BODY = RemoveBackgroundOf.model_validate({"imageUrl": data_url(Image.new("RGB", (8, 8)))})


@pytest.fixture
def made(installed_models: Settings, tmp_path: Path) -> Iterator[Services]:
    (tmp_path / "weights").symlink_to(installed_models.weights.absolute())
    opened = services.build_services(Settings(data=tmp_path, weights_toml=installed_models.weights_toml), [CPU])
    yield opened
    opened.database.close()


def files(made: Services) -> list[str]:
    return [path.name for path in made.files.root.iterdir()]


def owner(made: Services) -> Caller:
    return Caller(users.user_by_email(made.database.db, "owner@localhost"), None, "admin")


def test_a_request_that_is_refused_leaves_no_file(made: Services):
    async def submit(*_: Any, **__: Any) -> Any:
        assert files(made), "the input was stored by then"
        raise QueueFull("The queue is full.")

    made.dispatcher.submit = submit  # type: ignore[method-assign]
    with pytest.raises(QueueFull):
        asyncio.run(made.intake.accept(GenerationRequest(owner(made), "remove-bg", BODY, [])))
    assert files(made) == []


def test_a_call_that_breaks_off_while_its_job_is_queued_leaves_the_job_its_file(made: Services):
    async def story() -> None:
        submitting = asyncio.Event()

        async def submit(*_: Any, **__: Any) -> None:
            submitting.set()
            await asyncio.Event().wait()

        made.dispatcher.submit = submit  # type: ignore[method-assign, assignment]
        call = asyncio.create_task(made.intake.accept(GenerationRequest(owner(made), "remove-bg", BODY, [])))
        await submitting.wait()
        call.cancel()
        await asyncio.wait([call])

    asyncio.run(story())
    assert len(files(made)) == 1
