"""A catalogue with demo weights: the real one, beside tiny random weights in the layout of the demo's."""

import shutil
import subprocess
from pathlib import Path

from pipelines.catalog.catalog import WEIGHTS_TOML
from server.settings import PROJECT, Settings
from tests.support.tiny import flux as tiny_flux
from tests.support.tiny import video as tiny_video


def install_test_models(folder: Path) -> Settings:
    """A new server's settings: nothing is installed."""
    weights = folder / "weights" / "demo"
    tiny_flux.make_flux(weights / "flux", "schnell")
    tiny_video.make_wan(weights / "wan", "vace")
    tiny_video.make_ltx(weights / "ltx")
    subprocess.run([PROJECT / "scripts/sums", weights], check=True)
    shutil.copy(WEIGHTS_TOML, folder)
    return Settings(data=folder / "data", weights_toml=folder / "weights.toml")
