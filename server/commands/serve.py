"""`plantain serve`."""

import fcntl
import gc
import logging
import os
import socket
from pathlib import Path
from typing import IO, Annotated

import typer
import uvicorn
from rich.console import Console

from pipelines.base import UnusableWeights
from pipelines.catalog import Catalog
from pipelines.weights.errors import PullError
from pipelines.weights.pull import installed
from server import open_mode, services
from server.app import create_app
from server.commands.weights import pull_each
from server.farewell import PatientServer
from server.opening import advice
from server.settings import PROJECT, Settings, SettingsError, from_environment

SHUTDOWN_S = 30


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [8000]")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder for database, files and weights. [data]")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Forbid every connection to the outside.")] = None,
    public_url: Annotated[str | None, typer.Option(help="This server's address as callers see it.")] = None,
    open_: Annotated[bool | None, typer.Option("--open", help="For you alone: no key, no limits.")] = None,
    open_to_the_network: Annotated[
        bool | None, typer.Option("--open-to-the-network", help="Let --open listen where others can reach it.")
    ] = None,
    demo: Annotated[
        bool | None, typer.Option("--demo/--no-demo", help="Demo weights for what is not installed. [on]")
    ] = None,
) -> None:
    """Serve the API. Options win over `PLANTAIN_…` environment variables."""
    chosen = {"host": host, "port": port, "data": data, "offline": offline, "public_url": public_url}
    chosen |= {"open": open_, "open_to_the_network": open_to_the_network, "demo": demo}
    settings = Settings(**{**from_environment(), **{k: v for k, v in chosen.items() if v is not None}})  # type: ignore[arg-type]
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with lock_data(settings.data):
        made = _make(settings)
        config = uvicorn.Config(
            create_app(made),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=SHUTDOWN_S,
            server_header=False,
        )
        listener = config.bind_socket()  # before the greeting says that it listens
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it for sockets it did not make
        _greet(settings, made)
        gc.collect()
        gc.freeze()  # what lives as long as the server need not be walked again: that stops all calls for so long
        PatientServer(config, made.dispatcher, settings.stop_patience_s).run([listener])


def _make(settings: Settings) -> services.Services:
    try:
        open_mode.check_settings(settings)
        _fetch_starter(settings)
        return services.make(settings)
    except (SettingsError, UnusableWeights) as error:
        raise typer.Exit(_complain(str(error))) from None


def lock_data(data: Path) -> IO[str]:
    """Hold the data folder for this process: two servers on one queue would run its jobs twice."""
    try:  # the folder has keys, sessions and pictures: it is not for others on this machine
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (data / "lock").open("a+")
    except OSError as error:
        raise typer.Exit(_complain(f"{data}: {advice(error)}")) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise typer.Exit(_complain(f"Another server is using {data}.")) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _fetch_starter(settings: Settings) -> None:
    """Once: the small models that make a new server useful. Without them it serves what else there is, and says so."""
    catalog = Catalog.load(settings.weights_toml)
    missing = [catalog.find(name) for name in catalog.starter if not installed(catalog.find(name), settings.weights)]
    try:
        if missing:
            pull_each(missing, settings.weights, settings.offline, accept_licence=False)
    except PullError as error:
        Console(stderr=True).print(f"[yellow]{error}[/yellow]", highlight=False)


def _greet(settings: Settings, made: services.Services) -> None:
    """Where it listens, what it runs on, the first key, and a line to paste."""
    console = Console(highlight=False, soft_wrap=True)
    address = settings.public_url or f"http://{_host(settings.host)}:{settings.port}"
    console.print(f"Plantain listens on [bold]{address}[/bold]")
    for worker in made.dispatcher.workers.values():
        device = worker.supervisor.device
        console.print(f"  {device.name} ({device.id}): {device.budget_bytes / 2**30:.1f} GiB to give out")
    if on_demo := made.shelf.on_demo():
        console.print(
            f"On demo weights, which draw simple shapes: {', '.join(on_demo)}. "
            "The real ones: plantain pull MODEL. Without the demo: --no-demo",
            style="yellow",
        )
    if made.first_key:
        console.print(f"\nYour API key, shown this once: [bold]{made.first_key}[/bold]")
    if settings.open:
        console.print("Open: it takes every call from this machine, and asks for no key.")
    key = "" if settings.open else made.first_key or "$PLANTAIN_KEY"
    console.print("\nTry it:\n")
    console.print(_curl(address, key, made), markup=False)
    console.print()


def _curl(address: str, key: str, made: services.Services) -> str:
    """A line that works when pasted: it cuts out the picture that lies beside the README."""
    picture = f"$(base64 < {PROJECT / 'docs/astronaut.jpg'} | tr -d '\\n')"
    authorization = f" -H 'Authorization: Bearer {key}'" if key else ""
    return (
        f"curl {address}/api/image/fal/remove-bg{authorization} \\\n"
        f'  -d "{{\\"imageUrl\\": \\"data:image/jpeg;base64,{picture}\\"}}"'
    )


def _host(host: str) -> str:
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - what was asked to listen on is not what one calls
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _complain(text: str) -> int:
    Console(stderr=True).print(f"[red]{text}[/red]")
    return 1
