"""Fixtures that more than one file uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest-xdist's controller loads this file too: it is up at once without torch
    from server.settings import Settings
    from tests.fake_fal import FakeFal
    from tests.house import House


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Installed weights that tests share; a test that serves gets a data folder of its own beside them."""
    from tests.house import furnish

    return furnish(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and on a busy machine threads that wait for each other lose twentyfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def house(furnished: Settings) -> Iterator[House]:
    """One server for all tests that do not harm it: its worker takes seconds to start."""
    from tests.house import running

    with running(furnished) as it:
        it.until(lambda: it.client.get("/readyz").is_success)
        yield it


@pytest.fixture(scope="module")
def one_fal() -> Iterator[FakeFal]:
    """One for all tests of a file; each begins with `anew`."""
    from tests.fake_fal import FakeFal

    with FakeFal().running() as fake:
        yield fake
