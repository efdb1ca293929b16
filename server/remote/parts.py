"""Puts the desk together, as the settings say."""

import httpx

from pipelines.catalog import Catalog
from server.addresses import Guard
from server.outputs import Files
from server.remote.collect import Collector
from server.remote.desk import Clock, Desk
from server.remote.errand import Timing
from server.remote.queue import Connection
from server.remote.storage import Storage
from server.settings import Settings

NO_KEY = "no key for it is set. The operator's is read from FAL_KEY."
OFFLINE = "this server is offline."
LOCAL_ONLY = "this server runs everything itself."


def make(settings: Settings, catalog: Catalog, files: Files, clock: Clock, timing: Timing | None = None) -> Desk:
    """Without a key, or where the operator forbids it, nothing is ever sent."""
    guard = Guard(settings.allowed_networks)
    timing = timing or Timing(deadline_s=settings.remote_deadline_s)
    tls = httpx.create_ssl_context()
    collector = Collector(files, guard, tls, settings.pass_through_urls, timing.retry_s)
    if trouble := why_not(settings):
        return Desk(catalog, collector, None, timing, clock, trouble)
    connection = Connection.open(settings.fal_key or "", settings.fal_queue_url, settings.fal_rest_url, tls)
    return Desk(catalog, collector, Storage(connection, guard, tls), timing, clock)


def why_not(settings: Settings) -> str:
    """Why nothing can be sent to fal; empty if it can."""
    if settings.offline:
        return OFFLINE
    if settings.route == "local-only":
        return LOCAL_ONLY
    return "" if settings.fal_key else NO_KEY
