"""`plantain serve`."""
# FROM server.farewell: How the server ends: at the first signal it lets the running jobs finish, at the second it ends at once.

import asyncio
import gc
import logging
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn
from rich.console import Console

from pipelines.base import UnusableWeights
from pipelines.catalog.reader import load_catalog
from pipelines.weights.errors import PullError
from pipelines.weights.pull import installed
from server import services
from server.app import create_app
from server.cli.common import lock_data, print_error
from server.cli.weights import pull_each
from server.dispatch.dispatcher import Dispatcher
from server.settings import PROJECT, Settings, SettingsError, check_settings, from_environment

log = logging.getLogger("plantain.farewell")


class GracefulServer(uvicorn.Server):
    """Answers calls while the running jobs finish. Queued jobs go on at the next start, at no cost of an attempt."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, patience_s: float) -> None:
        super().__init__(config)
        self.dispatcher, self.patience_s = dispatcher, patience_s
        self._leaving: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter between two steps of the event loop."""
        self._signals += 1
        name = signal.Signals(sig).name
        if not self.started or self._signals > 1:
            log.warning("%s: ending at once; what runs goes on at the next start", name)
            self.config.timeout_graceful_shutdown = 0
            self.should_exit = True
        else:
            log.warning(
                "%s: the running jobs finish first, at most %.0f s; again to end at once", name, self.patience_s
            )
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._leaving = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self.dispatcher.drain(self.patience_s)
        self.should_exit = True


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
        _print_startup(settings, made)
        gc.collect()
        gc.freeze()  # what lives as long as the server need not be walked again: that stops all calls for so long
        GracefulServer(config, made.dispatcher, settings.stop_patience_s).run([listener])


def _make(settings: Settings) -> services.Services:
    try:
        check_settings(settings)
        _fetch_starter(settings)
        return services.build_services(settings)
    except (SettingsError, UnusableWeights) as error:
        raise typer.Exit(print_error(str(error))) from None


def _fetch_starter(settings: Settings) -> None:
    """Once: the small models that make a new server useful. Without them it serves what else there is, and says so."""
    catalog = load_catalog(settings.weights_toml)
    missing = [catalog.find(name) for name in catalog.starter if not installed(catalog.find(name), settings.weights)]
    try:
        if missing:
            pull_each(missing, settings.weights, settings.offline, accept_licence=False)
    except PullError as error:
        Console(stderr=True).print(f"[yellow]{error}[/yellow]", highlight=False)


def _print_startup(settings: Settings, made: services.Services) -> None:
    """Where it listens, what it runs on, the first key, and a line to paste."""
    console = Console(highlight=False, soft_wrap=True)
    address = settings.public_url or f"http://{_host(settings.host)}:{settings.port}"
    console.print(f"Plantain listens on [bold]{address}[/bold]")
    for worker in made.dispatcher.status.workers.values():
        device = worker.supervisor.device
        console.print(f"  {device.name} ({device.id}): {device.budget_bytes / 2**30:.1f} GiB to give out")
    if on_demo := made.registry.on_demo():
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
