"""What the routes may use, made once per application."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipelines.catalog import Catalog
from pipelines.installed import Installed
from server import accounts, open_mode
from server.addresses import Guard
from server.auth import parts
from server.auth.parts import Auth
from server.clips import Clips
from server.devices import DeviceSpec, inventory
from server.dispatcher import Dispatcher
from server.gate import Gate
from server.intake import Intake
from server.media import Media
from server.outputs import Files
from server.plans import Plans
from server.prices import FalPrice, fal_prices
from server.remote import parts as remote
from server.remote.desk import Desk
from server.remote.errand import Timing
from server.settings import Settings
from server.shelf import Shelf
from server.store import Store

Clock = Callable[[], float]

STRAY_AGE_S = 3600.0
"""Files that belong to nothing are deleted at start, but for the newest: a person may just have put them there."""


@dataclass(frozen=True)
class Services:
    settings: Settings
    store: Store
    files: Files
    shelf: Shelf
    media: Media
    dispatcher: Dispatcher
    intake: Intake
    auth: Auth
    plans: Plans
    gate: Gate
    fal_prices: Mapping[str, FalPrice]
    clock: Clock
    first_key: str | None
    """The owner's API key, on the very first start only."""

    async def start(self) -> None:
        known = await self.store.call(self.store.file_names)
        self.files.sweep(known, older_than_s=STRAY_AGE_S)
        await self.dispatcher.start()

    async def stop(self) -> None:
        await self.dispatcher.stop()
        await self.auth.stop()
        self.store.close()


def make(
    settings: Settings,
    devices: list[DeviceSpec] | None = None,
    clock: Clock = time.time,
    timing: Timing | None = None,
) -> Services:
    """Opens the database and the folders; starts nothing yet."""
    open_mode.check_settings(settings)
    plans = Plans.load(settings.plans_toml)
    store = Store(settings.database)
    with store.atomic() as db:
        first_key = accounts.create_owner(db, clock())
    files = Files(settings.files)
    shelf = Shelf(Catalog.load(settings.weights_toml), Installed(settings.weights, settings.demo))
    media = Media(files, offline=settings.offline, allowed_networks=settings.allowed_networks)
    desk = remote.make(settings, shelf.catalog, files, clock, timing)
    dispatcher = make_dispatcher(settings, store, files, shelf, devices, desk, clock)
    clips = Clips(files, Guard(settings.allowed_networks), offline=settings.offline)
    intake = Intake(shelf, media, clips, files, dispatcher, desk, settings.route)
    return Services(
        settings=settings,
        store=store,
        files=files,
        shelf=shelf,
        media=media,
        dispatcher=dispatcher,
        intake=intake,
        auth=parts.make(settings),
        plans=plans,
        gate=Gate(store, plans),
        fal_prices=fal_prices(settings.fal_prices_toml),
        clock=clock,
        first_key=first_key,
    )


def make_dispatcher(
    settings: Settings,
    store: Store,
    files: Files,
    shelf: Shelf,
    devices: list[DeviceSpec] | None,
    desk: Desk,
    clock: Clock,
) -> Dispatcher:
    """`devices` is None for those that the machine has."""
    return Dispatcher(
        store,
        files,
        shelf,
        inventory(settings.budget_bytes) if devices is None else devices,
        desk=desk,
        max_queued=settings.max_queued,
        max_queued_each=settings.max_queued_each,
        clock=clock,
    )
