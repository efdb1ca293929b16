"""`plantain serve`: starts the server, and shuts it down gracefully."""

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
from server.app import create_app
from server.cli.common import lock_data, print_error
from server.cli.weights import pull_each
from server.dispatch.dispatcher import Dispatcher
from server.services import Services, build_services
from server.settings import PROJECT, Settings, SettingsError, check_settings, from_environment

log = logging.getLogger("plantain.serve")

CONNECTIONS_TIMEOUT_S = 30
"""How long open connections may take to finish after the jobs have."""


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [8000]")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder for database, files and weights. [data]")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Forbid all outgoing connections.")] = None,
    public_url: Annotated[str | None, typer.Option(help="This server's address as callers see it.")] = None,
    open_: Annotated[
        bool | None, typer.Option("--open", help="For one user on this machine: no key, no limits.")
    ] = None,
    open_to_the_network: Annotated[
        bool | None, typer.Option("--open-to-the-network", help="Allow --open on an address that others can reach.")
    ] = None,
    demo: Annotated[
        bool | None, typer.Option("--demo/--no-demo", help="Use demo weights for models that are not installed. [on]")
    ] = None,
) -> None:
    """Serve the API. Options take precedence over PLANTAIN_… environment variables."""
    chosen = {"host": host, "port": port, "data": data, "offline": offline, "public_url": public_url}
    chosen |= {"open": open_, "open_to_the_network": open_to_the_network, "demo": demo}
    settings = Settings(**{**from_environment(), **{k: v for k, v in chosen.items() if v is not None}})  # type: ignore[arg-type]
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with lock_data(settings.data):
        services = _build(settings)
        config = _server_config(settings, services)
        listener = config.bind_socket()  # before the start-up message says that it listens
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it on its own sockets only
        _print_startup(settings, services)
        gc.collect()
        gc.freeze()  # long-lived objects are not scanned again: a full collection pauses all requests
        GracefulServer(config, services.dispatcher, settings.shutdown_timeout_s).run([listener])


class GracefulServer(uvicorn.Server):
    """Graceful shutdown: serves requests while the running jobs finish. Queued jobs run after the next start.

    A second signal ends the server at once; the jobs it interrupts run again, without using up an attempt.
    """

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, timeout_s: float) -> None:
        super().__init__(config)
        self.dispatcher, self.timeout_s = dispatcher, timeout_s
        self._drain_task: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler; runs between two steps of the event loop."""
        self._signals += 1
        name = signal.Signals(sig).name
        if not self.started or self._signals > 1:
            log.warning("%s: stopping at once; running jobs start again at the next start", name)
            self.config.timeout_graceful_shutdown = 0
            self.should_exit = True
        else:
            log.warning(
                "%s: waiting up to %.0f s for running jobs; send it again to stop at once", name, self.timeout_s
            )
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain_task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self.dispatcher.drain(self.timeout_s)
        self.should_exit = True


def _build(settings: Settings) -> Services:
    try:
        check_settings(settings)
        _fetch_starter(settings)
        return build_services(settings)
    except (SettingsError, UnusableWeights) as error:
        raise typer.Exit(print_error(str(error))) from None


def _server_config(settings: Settings, services: Services) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(services),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=CONNECTIONS_TIMEOUT_S,
        server_header=False,
    )


def _fetch_starter(settings: Settings) -> None:
    """Downloads the starter models if missing. If that fails, prints a warning and serves without them."""
    catalog = load_catalog(settings.weights_toml)
    missing = [catalog.find(name) for name in catalog.starter if not installed(catalog.find(name), settings.weights)]
    try:
        if missing:
            pull_each(missing, settings.weights, settings.offline, accept_licence=False)
    except PullError as error:
        Console(stderr=True).print(str(error), style="yellow", markup=False, highlight=False)


def _print_startup(settings: Settings, services: Services) -> None:
    """Prints the address, the devices, the first key, and a curl command to paste."""
    console = Console(highlight=False, soft_wrap=True)
    address = settings.public_url or f"http://{_host(settings.host)}:{settings.port}"
    console.print(f"Plantain listens on [bold]{address}[/bold]")
    for worker in services.dispatcher.status.workers.values():
        device = worker.supervisor.device
        console.print(f"  {device.name} ({device.id}): {device.budget_bytes / 2**30:.1f} GiB usable")
    if on_demo := services.registry.on_demo():
        console.print(
            f"On demo weights, which draw simple shapes: {', '.join(on_demo)}. "
            "To install the real ones: plantain pull MODEL. To disable the demo: --no-demo",
            style="yellow",
        )
    if services.first_key:
        console.print(f"\nYour API key, shown this once: [bold]{services.first_key}[/bold]")
    if settings.open:
        console.print("Open: accepts every call from this machine without a key.")
    key = "" if settings.open else services.first_key or "$PLANTAIN_KEY"
    console.print("\nTry it:\n")
    console.print(_curl(address, key), markup=False)
    console.print()


def _curl(address: str, key: str) -> str:
    """A curl command that removes the background of the image in `docs/`."""
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
