"""Settings: what an operator may choose, read once into a frozen dataclass. Open mode is for loopback only."""

import ipaddress
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from pipelines.catalog.catalog import PROJECT

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Route = Literal["local-only", "prefer-local", "remote-only"]


class SettingsError(ValueError):
    """What the operator chose cannot be. The message is for them."""


@dataclass(frozen=True)
class Settings:
    """Each field is a `plantain serve` option or, in capitals after `PLANTAIN_`, an environment variable."""

    data: Path = Path("data")
    """The folder that holds everything: database, files, weights."""
    host: str = "127.0.0.1"
    port: int = 8000
    public_url: str | None = None
    """What callers see as this server's address; by default whatever address they called."""
    offline: bool = False
    """Forbid every connection to the outside: downloads, fal.ai, and input URLs on other hosts."""
    weights_toml: Path = PROJECT / "weights.toml"
    """The catalogue of models."""
    demo: bool = True
    """Run models that are not installed on the demo weights that come with the program, and say so."""
    max_queued: int = 10_000
    """Jobs that may wait; one more is refused with 503."""
    max_queued_each: int = 1_000
    """Jobs of one user that may wait; one more is refused with 429."""
    shutdown_timeout_s: float = 120.0
    """How long running jobs may take to finish when the server is asked to stop."""
    budget_bytes: int | None = None
    """Bytes that may be given out on each device, where fewer than the device has."""
    allowed_networks: tuple[Network, ...] = field(default=())
    """Private networks that input URLs may name, such as a studio's own file server."""
    open: bool = False
    """For one person on their own machine: no key is needed, nothing is refused for want of credits or by a plan."""
    open_to_the_network: bool = False
    """Let `open` listen on an address that others can reach: they may do everything."""
    fal_key: str | None = field(default=None, repr=False)
    """The key of your account at fal.ai, for models that do not run here; also read from `FAL_KEY`."""
    fal_queue_url: str = "https://queue.fal.run"
    """Where fal's queue is. Another address is a mirror, or a test."""
    fal_rest_url: str = "https://rest.fal.ai"
    """Where fal takes input files."""
    route: Route = "prefer-local"
    """Where jobs run: `prefer-local`, `remote-only` or `local-only`; the last one callers cannot override."""
    pass_through_urls: bool = False
    """Answer fal's own URL for an output of fal's. It is kept here all the same."""
    remote_deadline_s: float = 1800.0
    """How long a job may take at fal before it is given up and refunded."""
    trusted_origins: tuple[str, ...] = ()
    """Other sites, `https://studio.example` or `https://*.example.com`, whose pages may use people's sessions."""
    smtp_url: str | None = None
    """Where mails go: `smtp://user:password@host:587`, `smtps://…`; else into `outbox.log` in the data folder."""
    mail_from: str = "plantain@localhost"
    limit_sign_in: bool = True
    """Refuse more than three attempts to sign in within ten seconds from one address."""

    @property
    def database(self) -> Path:
        return self.data / "plantain.sqlite"

    @property
    def plans_toml(self) -> Path:
        """The operator's changes to the plans."""
        return self.data / "plans.toml"

    @property
    def fal_prices_toml(self) -> Path:
        """What fal takes, in dollars, as far as the operator says so."""
        return self.data / "fal-prices.toml"

    @property
    def files(self) -> Path:
        return self.data / "files"

    @property
    def weights(self) -> Path:
        return self.data / "weights"


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The fields that `PLANTAIN_…` variables set. Raises ValueError for one that cannot be read."""
    readers: dict[str, Callable[[str], object]] = {
        "data": Path,
        "host": str,
        "port": int,
        "public_url": str,
        "offline": _boolean,
        "weights_toml": Path,
        "demo": _boolean,
        "max_queued": int,
        "max_queued_each": int,
        "shutdown_timeout_s": float,
        "budget_bytes": int,
        "allowed_networks": _networks,
        "open": _boolean,
        "open_to_the_network": _boolean,
        "fal_key": str,
        "fal_queue_url": str,
        "fal_rest_url": str,
        "route": _route,
        "pass_through_urls": _boolean,
        "remote_deadline_s": float,
        "trusted_origins": _words,
        "smtp_url": str,
        "mail_from": str,
        "limit_sign_in": _boolean,
    }
    found = {name: environment.get(f"PLANTAIN_{name.upper()}") for name in readers}
    found["fal_key"] = found["fal_key"] or environment.get("FAL_KEY")
    old_name = "PLANTAIN_STOP_PATIENCE_S"  # until the next release
    found["shutdown_timeout_s"] = found["shutdown_timeout_s"] or environment.get(old_name)
    return {name: readers[name](text) for name, text in found.items() if text}


def _boolean(text: str) -> bool:
    if text.lower() not in {"1", "0", "true", "false", "yes", "no"}:
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in {"1", "true", "yes"}


def _route(text: str) -> Route:
    if text not in get_args(Route):
        raise ValueError(f"{text!r} is none of {', '.join(get_args(Route))}")
    return cast(Route, text)


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


ANY_ADDRESS = {"0.0.0.0", "::"}  # noqa: S104 - what was asked to listen on is not what one calls


def address_of(settings: Settings) -> str:
    """For links in mails and for redirects. Never the Host header: whoever sends it would choose where tokens go."""
    host = "127.0.0.1" if settings.host in ANY_ADDRESS else settings.host
    return (settings.public_url or f"http://{f'[{host}]' if ':' in host else host}:{settings.port}").rstrip("/")


class OpenToAll(SettingsError):
    """`--open` on an address that others can reach."""


def check_settings(settings: Settings) -> None:
    """Raises OpenToAll unless this was said twice."""
    if settings.open and not settings.open_to_the_network and not is_loopback(settings.host):
        raise OpenToAll(
            f"--open lets everyone who reaches {settings.host} do everything, without a key. Listen on 127.0.0.1, "
            "or say --open-to-the-network as well."
        )


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
