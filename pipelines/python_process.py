"""How a subprocess finds this program's modules: on the parent's `sys.path`, whatever the working directory holds."""

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m module`; with `-P`, since a folder `server` in the working directory must not be imported instead."""
    return [sys.executable, "-P", "-m", module, *arguments]


def import_environment() -> dict[str, str]:
    """This process's environment, with its `sys.path` as `PYTHONPATH`; multiprocessing's spawn does the same."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)}
