"""Background removal against `rembg s`, rembg's own HTTP server: same network, same threads, same photo.

Each server runs alone, at each concurrency in turn. Ours gets the photo as a data URL and its PNG is fetched, too, so
both sides move the same bytes. Prints pictures a second, p95, memory of the process tree, and the ratios.
"""

import argparse
import base64
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from PIL import Image
from skimage import data

PEER = "rembg[cpu,cli]==2.0.86"
HOME = Path("build/rembg")
NETWORK = Path("data/weights/u2netp/u2netp.onnx")
THREADS = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": THREADS, "U2NET_HOME": str(HOME.resolve() / "home")}
OURS_PORT, PEER_PORT = 8198, 8197


@dataclass(frozen=True)
class Figures:
    pictures_a_second: float
    p95_s: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=32, help="at each concurrency")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    install_peer()
    photo = io.BytesIO()
    Image.fromarray(data.coffee()).save(photo, "jpeg", quality=90)
    with ours(photo.getvalue()) as (ask, process):
        mine = {number: measure(ask, process, number, options.pictures) for number in options.concurrency}
    with peer(photo.getvalue()) as (ask, process):
        theirs = {number: measure(ask, process, number, options.pictures) for number in options.concurrency}
    report(mine, theirs)


def install_peer() -> None:
    if (HOME / "venv/bin/rembg").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", HOME / "venv"], check=True)
    uv = Path(sys.executable).parent / "uv"
    python = HOME / "venv/bin/python"
    subprocess.run([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, PEER], check=True)
    (HOME / "home").mkdir()
    (HOME / "home/u2netp.onnx").symlink_to(NETWORK.resolve())


Asked = tuple[Callable[[], int], psutil.Process]


@contextlib.contextmanager
def ours(photo: bytes) -> Iterator[Asked]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights").symlink_to(NETWORK.parent.parent.resolve())
        told = Path(folder, "told")
        command = [Path(sys.executable).parent / "plantain", "serve", "--data", folder, "--port", str(OURS_PORT)]
        with told.open("w") as output, started(command, OURS_PORT, "/readyz", stdout=output) as process:
            key = next(word for word in told.read_text().split() if word.startswith("bnp_"))
            client = httpx.Client(base_url=f"http://127.0.0.1:{OURS_PORT}", timeout=300)
            client.headers["Authorization"] = f"Bearer {key}"
            body = {"imageUrl": f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"}

            def ask() -> int:
                answer = client.post("/api/image/fal/remove-bg", json=body).raise_for_status().json()
                return len(client.get(answer["imageUrl"]).raise_for_status().content)

            yield ask, process
            client.close()


@contextlib.contextmanager
def peer(photo: bytes) -> Iterator[Asked]:
    command = [HOME / "venv/bin/rembg", "s", "--no-ui", "--host", "127.0.0.1", "--port", str(PEER_PORT)]
    with started(command, PEER_PORT, "/api", stdout=subprocess.DEVNULL) as process:
        client = httpx.Client(base_url=f"http://127.0.0.1:{PEER_PORT}", timeout=300)

        def ask() -> int:
            form = {"model": "u2netp"}
            answer = client.post("/api/remove", files={"file": ("x.jpg", photo)}, data=form)
            return len(answer.raise_for_status().content)

        yield ask, process
        client.close()


@contextlib.contextmanager
def started(command: list, port: int, route: str, **how: object) -> Iterator[psutil.Process]:
    server = subprocess.Popen([str(part) for part in command], env=ENVIRONMENT, stderr=subprocess.DEVNULL, **how)  # type: ignore[call-overload]
    try:
        end = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}{route}"):
            if time.monotonic() > end or server.poll() is not None:
                raise TimeoutError(f"{command[0]} does not answer")
            time.sleep(0.2)
        yield psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def measure(ask: Callable[[], int], process: psutil.Process, concurrency: int, pictures: int) -> Figures:
    for _ in range(3):
        ask()
    peak = [0]

    def timed(_: int) -> float:
        start = time.perf_counter()
        assert ask() > 10_000
        peak[0] = max(peak[0], tree_bytes(process))
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        times = list(pool.map(timed, range(pictures)))
    spent = time.perf_counter() - start
    return Figures(pictures / spent, statistics.quantiles(times, n=20)[-1], peak[0])


def tree_bytes(process: psutil.Process) -> int:
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])


def report(mine: dict[int, Figures], theirs: dict[int, Figures]) -> None:
    print(f"u2netp, coffee 600x400, {THREADS} threads, {os.cpu_count()} cores")
    for number, own in mine.items():
        other = theirs[number]
        print(
            f"concurrency {number:2}: plantain {own.pictures_a_second:.2f}/s, p95 {own.p95_s:.2f} s,"
            f" {own.peak_bytes / 2**30:.2f} GiB | rembg s {other.pictures_a_second:.2f}/s, p95 {other.p95_s:.2f} s,"
            f" {other.peak_bytes / 2**30:.2f} GiB | speed {own.pictures_a_second / other.pictures_a_second:.2f},"
            f" p95 {own.p95_s / other.p95_s:.2f}, memory {own.peak_bytes / other.peak_bytes:.2f} of rembg's"
        )


if __name__ == "__main__":
    main()
