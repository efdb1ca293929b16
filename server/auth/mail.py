"""Where mails go: to an SMTP server, or into a file that only the operator reads. Never into the log."""

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
"""Blocks; raises OSError (smtplib's errors are of it)."""


class Mailer:
    """Mails, and the work that leads to them, go on behind the answer's back: its time must not tell who is known."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._tasks: set[asyncio.Task[None]] = set()

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def send(self, mail: Mail) -> None:
        try:
            await asyncio.to_thread(self._deliver, mail)
        except OSError as error:
            log.error("The mail %r could not be sent: %s", mail.subject, type(error).__name__)

    async def wait(self) -> None:
        """Until all that was begun has ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("A mail could not be made: %s", type(error).__name__, exc_info=error)


def from_settings(settings: Settings) -> Mailer:
    if settings.smtp_url and not settings.offline:
        return Mailer(smtp(settings.smtp_url, settings.mail_from))
    return Mailer(file(settings.data / "outbox.log"))


def file(path: Path) -> Deliver:
    """A line of JSON for each mail, readable by the owner of the file alone: there are reset links in it."""

    def deliver(mail: Mail) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"at": formatdate(usegmt=True), **vars(mail)}) + "\n")
        log.info("No mail server is set: the mail %r lies in %s", mail.subject, path)

    return deliver


def smtp(url: str, sender: str) -> Deliver:
    """`smtps://` speaks TLS from the start, `smtp://` as soon as the server offers it, and before any password."""
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
                raise smtplib.SMTPNotSupportedError("the server takes passwords in clear only")
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
