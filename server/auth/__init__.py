"""Better Auth's rules for sessions and passwords, without HTTP: functions of a connection and plain values."""

from dataclasses import dataclass

from server.auth import mail, secret
from server.auth.mail import Mailer
from server.auth.passwords import Passwords
from server.auth.rate_limit import SignInRateLimiter
from server.auth.secret import Secret
from server.settings import Settings


@dataclass(frozen=True)
class Auth:
    """What the sign-in routes work with, one per application."""

    secret: Secret
    passwords: Passwords
    sign_in_limiter: SignInRateLimiter
    mailer: Mailer

    async def stop(self) -> None:
        await self.mailer.wait()
        self.passwords.close()


def build_auth(settings: Settings) -> Auth:
    return Auth(secret.load(settings.data), Passwords(), SignInRateLimiter(), mail.from_settings(settings))
