#!/usr/bin/env python
"""Make tiny weights of the real classes in a folder, in seconds: `scripts/tools/tiny_weights.py DIR`."""

import sys
from pathlib import Path

from tests.support.tiny.flux import make_all

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name, folder in make_all(Path(sys.argv[1])).items():
        print(name, folder)
