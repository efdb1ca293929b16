"""`plantain serve`."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO, Annotated

import typer
import uvicorn
from rich.console import Console

from server import services
from server.app import create_app
from server.settings import Settings, from_environment

SHUTDOWN_S = 30


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [8000]")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder for database, files and weights. [data]")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Forbid every connection to the outside.")] = None,
    public_url: Annotated[str | None, typer.Option(help="This server's address as callers see it.")] = None,
) -> None:
    """Serve the API. Options win over `PLANTAIN_…` environment variables."""
    chosen = {"host": host, "port": port, "data": data, "offline": offline, "public_url": public_url}
    settings = Settings(**{**from_environment(), **{k: v for k, v in chosen.items() if v is not None}})  # type: ignore[arg-type]
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    lock = lock_data(settings.data)
    made = services.make(settings)
    _greet(settings, made)
    uvicorn.run(
        create_app(made),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False,
    )
    lock.close()


def lock_data(data: Path) -> IO[str]:
    """Hold the data folder for this process: two servers on one queue would run its jobs twice."""
    data.mkdir(parents=True, exist_ok=True)
    lock = (data / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise typer.Exit(_complain(f"Another server is using {data}.")) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _greet(settings: Settings, made: services.Services) -> None:
    """Where it listens, what it runs on, the first key, and a line to paste."""
    console = Console(highlight=False, soft_wrap=True)
    address = settings.public_url or f"http://{_host(settings.host)}:{settings.port}"
    console.print(f"Plantain listens on [bold]{address}[/bold]")
    for worker in made.dispatcher.workers.values():
        device = worker.supervisor.device
        console.print(f"  {device.name} ({device.id}): {device.budget_bytes / 2**30:.1f} GiB to give out")
    if made.first_key:
        console.print(f"\nYour API key, shown this once: [bold]{made.first_key}[/bold]")
    key = made.first_key or "$PLANTAIN_KEY"
    console.print("\nTry it:\n")
    console.print(_curl(address, key, made), markup=False)
    console.print()


def _curl(address: str, key: str, made: services.Services) -> str:
    """A line that works when pasted: it cuts out the picture that lies beside the README."""
    picture = "$(base64 < docs/coffee.jpg | tr -d '\\n')"
    return (
        f"curl {address}/api/image/fal/remove-bg -H 'Authorization: Bearer {key}' \\\n"
        f'  -d "{{\\"imageUrl\\": \\"data:image/jpeg;base64,{picture}\\"}}"'
    )


def _host(host: str) -> str:
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - what was asked to listen on is not what one calls
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _complain(text: str) -> int:
    Console(stderr=True).print(f"[red]{text}[/red]")
    return 1
