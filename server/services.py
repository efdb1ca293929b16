"""What the routes may use, made once per application."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipelines.catalog.reader import load_catalog
from pipelines.weights.installed import Installed
from server import auth
from server.accounts import admin
from server.accounts.authorization import Authorizer
from server.accounts.plans import Plans
from server.accounts.pricing import FalPrice, fal_prices
from server.auth import Auth
from server.db.database import Database
from server.dispatch.dispatcher import Dispatcher, Spawn
from server.dispatch.messages import Message, RemoteEvent
from server.dispatch.recovery import restore_peaks
from server.files.inputs import InputFiles
from server.files.store import FileStore
from server.intake.intake import Intake
from server.jobs.store import JobStore
from server.model_registry import ModelRegistry
from server.remote import runner
from server.remote.job import RemoteTimeouts
from server.settings import Settings, check_settings
from server.workers.devices import DeviceSpec, inventory
from server.workers.supervisor import Supervisor

Clock = Callable[[], float]

STRAY_AGE_S = 3600.0
"""Files that belong to nothing are deleted at start, but for the newest: a person may just have put them there."""


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    jobs: JobStore
    files: FileStore
    registry: ModelRegistry
    inputs: InputFiles
    dispatcher: Dispatcher
    intake: Intake
    auth: Auth
    plans: Plans
    authorizer: Authorizer
    fal_prices: Mapping[str, FalPrice]
    clock: Clock
    first_key: str | None
    """The owner's API key, on the very first start only."""

    async def start(self) -> None:
        known = await self.database.call(self.jobs.file_names)
        self.files.sweep(known, older_than_s=STRAY_AGE_S)
        await self.dispatcher.start()

    async def stop(self) -> None:
        await self.dispatcher.stop()
        await self.auth.stop()
        self.database.close()


def build_services(
    settings: Settings,
    devices: list[DeviceSpec] | None = None,
    clock: Clock = time.time,
    timing: RemoteTimeouts | None = None,
    spawn: Spawn = Supervisor,
) -> Services:
    """Opens the database and the folders; starts nothing yet."""
    check_settings(settings)
    plans = Plans.load(settings.plans_toml)
    database = Database(settings.database)
    jobs = JobStore(database)
    with database.atomic() as db:
        first_key = admin.create_owner(db, clock())
    files = FileStore(settings.files)
    devices = inventory(settings.budget_bytes) if devices is None else devices
    peaks = restore_peaks(jobs, devices)
    registry = ModelRegistry(load_catalog(settings.weights_toml), Installed(settings.weights, settings.demo), peaks)
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    inputs = InputFiles(files, offline=settings.offline, allowed_networks=settings.allowed_networks)
    remote = runner.build_remote(
        settings, registry.catalog, files, clock, lambda event: inbox.put_nowait(RemoteEvent(event)), timing
    )
    dispatcher = Dispatcher(
        jobs,
        files,
        registry,
        devices,
        inbox=inbox,
        spawn=spawn,
        remote=remote,
        max_queued=settings.max_queued,
        max_queued_each=settings.max_queued_each,
        clock=clock,
    )
    intake = Intake(registry, inputs, files, jobs, dispatcher, remote, settings.route, clock)
    return Services(
        settings=settings,
        database=database,
        jobs=jobs,
        files=files,
        registry=registry,
        inputs=inputs,
        dispatcher=dispatcher,
        intake=intake,
        auth=auth.build_auth(settings),
        plans=plans,
        authorizer=Authorizer(database, plans),
        fal_prices=fal_prices(settings.fal_prices_toml),
        clock=clock,
        first_key=first_key,
    )
