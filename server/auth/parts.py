"""What the auth routes work with, made once per application."""

from dataclasses import dataclass

from server.auth import outbox, secret
from server.auth.attempts import Attempts
from server.auth.outbox import Outbox
from server.auth.passwords import Passwords
from server.auth.secret import Secret
from server.settings import Settings


@dataclass(frozen=True)
class Auth:
    secret: Secret
    passwords: Passwords
    attempts: Attempts
    outbox: Outbox

    async def stop(self) -> None:
        await self.outbox.settle()
        self.passwords.close()


def make(settings: Settings) -> Auth:
    return Auth(secret.load(settings.data), Passwords(), Attempts(), outbox.from_settings(settings))
