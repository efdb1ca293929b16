"""Decode strangers' images in a process that may hang or die of them: `python -m pipelines.decoder`.

A line in: a path, as JSON. A line out: `{"image": {...}}`, or `{"refused": "why"}`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.base import InvalidInput
from pipelines.media.images import check_decodes


def answer(path: Path) -> dict[str, Any]:
    try:
        return {"image": asdict(check_decodes(path))}
    except InvalidInput as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(Path(json.loads(line)))), flush=True)
