"""E-mail: sent through SMTP, or appended to a file that only the operator can read. Never logged."""

import asyncio
import json
import logging
import os
import smtplib
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from server.settings import Settings

log = logging.getLogger("plantain.mail")

SMTP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Mail:
    to: str
    subject: str
    text: str


Deliver = Callable[[Mail], None]
"""Sends one mail. Blocks; raises OSError, which smtplib's errors are subclasses of."""


class Mailer:
    """Sends mail in the background, so that response time does not reveal whether an account exists."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._tasks: set[asyncio.Task[None]] = set()

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs work that may end in `send`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def send(self, mail: Mail) -> None:
        """Logs a failure by the type of the error only: its text may hold the address."""
        try:
            await asyncio.to_thread(self._deliver, mail)
        except OSError as error:
            log.error("The mail %r could not be sent: %s", mail.subject, type(error).__name__)

    async def wait(self) -> None:
        """Waits for all work started before."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("A mail could not be prepared: %s", type(error).__name__, exc_info=error)


def from_settings(settings: Settings) -> Mailer:
    """SMTP if the settings name a server and the network is allowed, else `outbox.log` in the data folder."""
    if settings.smtp_url and not settings.offline:
        return Mailer(smtp(settings.smtp_url, settings.mail_from))
    return Mailer(file(settings.data / "outbox.log"))


def file(path: Path) -> Deliver:
    """Appends each mail as a line of JSON. Mode 0600, since reset links are in it."""

    def deliver(mail: Mail) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"at": formatdate(usegmt=True), **vars(mail)}) + "\n")
        log.info("No mail server is configured: the mail %r is in %s", mail.subject, path)

    return deliver


def smtp(url: str, sender: str) -> Deliver:
    """Sends through a server. `smtps://` uses TLS from the start, `smtp://` STARTTLS if the server offers it.

    A password is never sent without TLS.
    """
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    trusted = ssl.create_default_context()

    def connect() -> smtplib.SMTP:
        if parts.scheme == "smtps":
            return smtplib.SMTP_SSL(host, parts.port or 465, timeout=SMTP_TIMEOUT_S, context=trusted)
        return smtplib.SMTP(host, parts.port or 587, timeout=SMTP_TIMEOUT_S)

    def deliver(mail: Mail) -> None:
        with connect() as server:
            if parts.scheme != "smtps" and server.ehlo() and server.has_extn("starttls"):
                server.starttls(context=trusted)
            elif parts.scheme != "smtps" and parts.username:
                raise smtplib.SMTPNotSupportedError("the server accepts passwords without TLS only")
            if parts.username:
                server.login(unquote(parts.username), unquote(parts.password or ""))
            server.send_message(message_of(mail, sender))

    return deliver


def message_of(mail: Mail, sender: str) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = sender, mail.to, mail.subject
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="plantain")
    message.set_content(mail.text)
    return message
