"""What knowing the caller costs: authenticated calls a second, the check alone, and charges at the same instant.

A server in a process of its own, over a real socket with kept-alive connections; `/healthz`, which knows nobody, is the
measure beside it.
"""

import argparse
import asyncio
import gc
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from server.accounts import admin, authorization, keys, ledger, users
from server.accounts.plans import Plans
from server.db.database import Database
from server.jobs.store import JobStore
from server.settings import Settings
from tests.support.app import GENERATE, install_test_models

CLIENTS = 100
CHARGES, COVERED = 200, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", type=Path, help="Serve this folder: what the benchmark starts beside itself.")
    parser.add_argument("--socket", type=int)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.socket)
    else:
        report(options.seconds)


def report(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = install_test_models(Path(folder))
        key = make_user(settings)
        report_check(settings, key)
        report_calls(Path(folder), key, seconds)


def make_user(settings: Settings) -> str:
    """With the credits of a sign-up and 40 more, on the plan without limits."""
    store = JobStore(Database(settings.database))
    with store.database.atomic() as db:
        admin.create_owner(db, time.time())
        user_id = users.create_user(db, "Ada", "ada@example.com", time.time(), plan="studio")
        ledger.grant(db, user_id, COVERED - users.SIGN_UP_CREDITS, "bench", time.time())
        _, key = keys.create_key(db, user_id, "bench", time.time())
    store.database.close()
    return key


def report_check(settings: Settings, key: str, calls: int = 5_000) -> None:
    """The check itself: hash, look-up, ban, scope, plan. No HTTP, no thread."""
    store = JobStore(Database(settings.database))
    authorizer = authorization.Authorizer(store.database, Plans.load())
    times_us = []
    for _ in range(calls):
        start = time.perf_counter()
        authorizer.authorize_key(key, authorization.READ, time.time())
        times_us.append((time.perf_counter() - start) * 1e6)
    store.database.close()
    quantiles = statistics.quantiles(times_us, n=100)
    print(f"check alone: median {quantiles[49]:.0f} us, p99 {quantiles[98]:.0f} us ({calls} calls)")


def report_calls(folder: Path, key: str, seconds: float) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    words = [sys.executable, __file__, "--serve", str(folder), "--socket", str(listener.fileno())]
    server = subprocess.Popen(words, pass_fds=[listener.fileno()])
    listener.close()
    try:
        asyncio.run(measure(port, key, seconds))
    finally:
        server.terminate()
        server.wait()


def serve(folder: Path, descriptor: int) -> None:
    """The app of the tests, whose workers end each job at once."""
    import uvicorn

    from tests.support.app import Clock, serve_app

    class Now(Clock):
        def __call__(self) -> float:
            return time.time()

    async def run() -> None:
        settings = Settings(data=folder / "data", weights_toml=folder / "weights.toml")
        async with serve_app(settings, Now()) as app:
            config = uvicorn.Config(app.asgi, log_level="warning", lifespan="off")
            gc.collect()
            gc.freeze()  # as `plantain serve` does
            await uvicorn.Server(config).serve([socket.socket(fileno=descriptor)])

    asyncio.run(run())


async def measure(port: int, key: str, seconds: float) -> None:
    await one_client(port, "GET", "/healthz", key, time.perf_counter() + 0.2)  # until it serves
    bare = await many(port, "/healthz", key, seconds)
    known = await many(port, "/api/credits", key, seconds)
    print(f"{CLIENTS} clients: GET /healthz {told(bare, seconds)}")
    print(f"{CLIENTS} clients: GET /api/credits {told(known, seconds)}, {len(known) / len(bare):.2f} of /healthz")
    start = time.perf_counter()
    body = json.dumps({"prompt": "work", "model": "plain"})
    answers = await asyncio.gather(*(call(port, "POST", GENERATE, key, body) for _ in range(CHARGES)))
    took_s = time.perf_counter() - start
    print(f"{CHARGES} charges at once, {COVERED} covered: {dict(Counter(answers))} in {took_s:.2f} s")


async def many(port: int, path: str, key: str, seconds: float) -> list[float]:
    """Each call's milliseconds, once all connections are open and warm."""
    await asyncio.gather(*(one_client(port, "GET", path, key, time.perf_counter() + 0.5) for _ in range(CLIENTS)))
    end = time.perf_counter() + seconds
    lists = await asyncio.gather(*(one_client(port, "GET", path, key, end) for _ in range(CLIENTS)))
    return [each for times in lists for each in times[1:]]


async def one_client(port: int, method: str, path: str, key: str, end: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times_ms = []
    while (start := time.perf_counter()) < end:
        assert await ask(reader, writer, method, path, key) == 200
        times_ms.append((time.perf_counter() - start) * 1000)
    writer.close()
    return times_ms


async def call(port: int, method: str, path: str, key: str, body: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await ask(reader, writer, method, path, key, body)
    finally:
        writer.close()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, key: str, body: str = ""
) -> int:
    """One call on an open connection, without a client library's own cost."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    return int(headers.split()[1])


def told(times_ms: list[float], seconds: float) -> str:
    quantiles = statistics.quantiles(times_ms, n=100)
    return f"{len(times_ms) / seconds:.0f} a second, median {quantiles[49]:.1f} ms, p99 {quantiles[98]:.1f} ms"


if __name__ == "__main__":
    main()
