"""A catalogue with demo weights: the real one, beside tiny random weights in the layout of the demo's."""

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
    write_catalogue(folder)
    return Settings(data=folder / "data", weights_toml=folder / "weights.toml")


def write_catalogue(folder: Path) -> Path:
    """The catalogue that is shipped, but its demo weights of Wan compute in float32.

    A processor without instructions for bfloat16 takes nine times as long for what is shipped.
    """
    before, wan, after = WEIGHTS_TOML.read_text().partition("[demo.wan]")
    toml = folder / "weights.toml"
    toml.write_text(before + wan + after.replace('"bfloat16"', '"float32"', 1))
    return toml
