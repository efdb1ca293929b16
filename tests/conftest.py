"""Fixtures that more than one file uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest-xdist's controller loads this file too: it is up at once without torch
    from server.settings import Settings
    from tests.support.fal import FakeFal
    from tests.support.server import LiveServer


@pytest.fixture(scope="session")
def installed_models(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Installed weights that tests share; a test that serves gets a data folder of its own beside them."""
    from tests.support.server import install_test_models

    return install_test_models(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and on a busy machine threads that wait for each other lose twentyfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def live_server(installed_models: Settings) -> Iterator[LiveServer]:
    """One server for all tests that do not harm it: its worker takes seconds to start."""
    from tests.support.server import running

    with running(installed_models) as it:
        it.until(lambda: it.client.get("/readyz").is_success)
        yield it


@pytest.fixture(scope="module")
def one_fal() -> Iterator[FakeFal]:
    """One for all tests of a file; each begins with `anew`."""
    from tests.support.fal import FakeFal

    with FakeFal().running() as fake:
        yield fake
