"""Adds to a wheel the files that lie outside its packages; everything else about the package is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("weights.toml", "weights/demo", "docs/astronaut.jpg")


class BuildWithFiles(build_py):
    """Copies FILES to `pipelines.catalog.catalog.PACKAGED`. An editable install uses those of the repository."""

    def run(self) -> None:
        super().run()
        packaged = Path(self.build_lib, "pipelines/catalog/data")
        for source in [] if self.editable_mode else [path for name in FILES for path in files_of(Path(name))]:
            (packaged / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, packaged / source)


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


setup(cmdclass={"build_py": BuildWithFiles})
