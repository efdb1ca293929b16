"""Fixtures that more than one file uses."""

from collections.abc import Iterator

import pytest
import torch

from server.settings import Settings
from tests.support.fal import FakeFal
from tests.support.server import LiveServer, install_test_models, running


@pytest.fixture(scope="session")
def installed_models(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Installed weights that tests share; a test that serves gets a data folder of its own beside them."""
    return install_test_models(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and on a busy machine threads that wait for each other lose twentyfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def live_server(installed_models: Settings) -> Iterator[LiveServer]:
    """One server for all tests that do not harm it: its worker takes seconds to start."""
    with running(installed_models) as server:
        server.until(lambda: server.client.get("/readyz").is_success)
        yield server


@pytest.fixture(scope="module")
def one_fal() -> Iterator[FakeFal]:
    """One for all tests of a file; each begins with `anew`."""
    with FakeFal().running() as fake:
        yield fake
