"""E-mail: through an SMTP server on loopback, or into a file."""

import asyncio
import json
import logging
import socketserver
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from pathlib import Path

import pytest

from server.auth import mail
from server.auth.mail import Mail, Mailer
from server.settings import Settings, from_environment

MAIL = Mail("ada@example.com", "Reset your password", "Open http://127.0.0.1/x?token=verysecret\nwithin the hour ✓")


class Conversation(socketserver.StreamRequestHandler):
    """A minimal SMTP server, without TLS."""

    def handle(self) -> None:
        said: list[str] = self.server.said  # type: ignore[attr-defined]
        self.say("220 here")
        while line := self.rfile.readline().decode().strip():
            said.append(line)
            match line.partition(" ")[0].upper():
                case "EHLO":
                    self.say("250-here\r\n250-AUTH PLAIN\r\n250 8BITMIME")
                case "DATA":
                    self.say("354 go on")
                    said.append(self.read_text())
                    self.say("250 kept")
                case "QUIT":
                    self.say("221 bye")
                    return
                case _:
                    self.say("250 fine")

    def say(self, line: str) -> None:
        self.wfile.write(line.encode() + b"\r\n")

    def read_text(self) -> str:
        lines = iter(self.rfile.readline, b".\r\n")
        return b"".join(lines).decode()


@contextmanager
def mail_server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the lines that clients send."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Conversation) as server:
        server.said = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}", server.said  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def send(box: Mailer, mail: Mail = MAIL) -> None:
    async def tell() -> None:
        box.run_in_background(box.send(mail))
        await box.wait()

    asyncio.run(tell())


def test_mail_is_sent_through_smtp(tmp_path: Path):
    with mail_server() as (address, said):
        send(mail.from_settings(Settings(data=tmp_path, smtp_url=f"smtp://{address}", mail_from="it@studio.example")))
    message = message_from_bytes(next(each for each in said if "Subject" in each).encode(), policy=policy.default)
    assert (message["from"], message["to"], message["subject"]) == ("it@studio.example", MAIL.to, MAIL.subject)
    assert message.get_content().replace("\r\n", "\n").strip() == MAIL.text  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_sent_in_clear(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with mail_server() as (address, said):
        send(mail.from_settings(Settings(data=tmp_path, smtp_url=f"smtp://me:hunter2@{address}")))
    assert not [line for line in said if line.upper().startswith("AUTH")]
    assert "could not be sent" in caplog.text and "hunter2" not in caplog.text


def test_an_unreachable_mail_server_is_logged_without_the_mail(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    send(mail.from_settings(Settings(data=tmp_path, smtp_url="smtp://127.0.0.1:1")))
    assert "could not be sent" in caplog.text and "verysecret" not in caplog.text


@pytest.mark.parametrize("more", [{}, {"smtp_url": "smtp://mail.example", "offline": True}])
def test_without_a_mail_server_mails_are_written_to_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict
):
    caplog.set_level(logging.INFO)
    box = mail.from_settings(Settings(data=tmp_path, **more))
    send(box)
    send(box)
    path = tmp_path / "outbox.log"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["to"], line["text"]) for line in lines] == [(MAIL.to, MAIL.text)] * 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "outbox.log" in caplog.text and "verysecret" not in caplog.text


def test_failed_background_work_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def tell() -> None:
        async def breaks() -> None:
            raise RuntimeError("nobody asked")

        box = mail.from_settings(Settings(data=tmp_path))
        box.run_in_background(breaks())
        await box.wait()

    asyncio.run(tell())
    assert "A mail could not be prepared: RuntimeError" in caplog.text


def test_headers_cannot_be_injected():
    with pytest.raises(ValueError, match="linefeed"):
        mail.message_of(Mail("a@b.co\nBcc: all@b.co", "x", "y"), "me@b.co")


def test_settings_come_from_the_environment():
    found = from_environment(
        {
            "PLANTAIN_TRUSTED_ORIGINS": "https://a.example, https://*.b.example",
            "PLANTAIN_SMTP_URL": "smtps://mail.example",
            "PLANTAIN_LIMIT_SIGN_IN": "no",
        }
    )
    assert found == {
        "trusted_origins": ("https://a.example", "https://*.b.example"),
        "smtp_url": "smtps://mail.example",
        "limit_sign_in": False,
    }
