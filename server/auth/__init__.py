"""Better Auth's sessions, passwords and API keys, as its official clients know them."""
# FROM server.auth.parts: What the auth routes work with, made once per application.

from dataclasses import dataclass

from server.auth import mail, secret
from server.auth.mail import Mailer
from server.auth.passwords import Passwords
from server.auth.rate_limit import SignInRateLimiter
from server.auth.secret import Secret
from server.settings import Settings


@dataclass(frozen=True)
class Auth:
    secret: Secret
    passwords: Passwords
    sign_in_limiter: SignInRateLimiter
    mailer: Mailer

    async def stop(self) -> None:
        await self.mailer.wait()
        self.passwords.close()


def build_auth(settings: Settings) -> Auth:
    return Auth(secret.load(settings.data), Passwords(), SignInRateLimiter(), mail.from_settings(settings))
