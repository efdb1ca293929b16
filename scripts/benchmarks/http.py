"""The HTTP process: time from its start to the first answer, and its resident memory, with no worker counted.

Prints both as shares of their aims (2 s, 150 MiB).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

PORT = 8199


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights").symlink_to(Path("data/weights").resolve())
        start = time.perf_counter()
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "plantain"), "serve", "--data", folder, "--port", str(PORT)],
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_for("/healthz")
            answered_s = time.perf_counter() - start
            wait_for("/readyz")
            resident = psutil.Process(server.pid).memory_info().rss
        finally:
            server.terminate()
            server.wait()
    print(f"first answer after {answered_s:.2f} s, {answered_s / 2:.2f} of the aim (2 s)")
    print(f"resident {resident / 2**20:.0f} MiB, {resident / (150 * 2**20):.2f} of the aim (150 MiB)")


def wait_for(route: str, patience_s: float = 120.0) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}{route}").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError(route)


if __name__ == "__main__":
    main()
