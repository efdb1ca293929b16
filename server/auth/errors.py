"""Better Auth's errors: the statuses, codes and texts that its clients match on."""

from collections.abc import Mapping

from server.errors import PlantainError


class AuthError(PlantainError):
    """An error of the sign-in routes. `code` is empty for the upstream errors that have none."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.status, self.code = status, code


def invalid_body(message: str) -> AuthError:
    return AuthError(400, "VALIDATION_ERROR", message)


def unauthorized() -> AuthError:
    return AuthError(401, "UNAUTHORIZED", "Unauthorized", {"WWW-Authenticate": 'Bearer realm="api"'})


def invalid_credentials() -> AuthError:
    """The same for a wrong password and an unknown address, so that neither reveals which accounts exist."""
    return AuthError(401, "INVALID_EMAIL_OR_PASSWORD", "Invalid email or password")


def banned() -> AuthError:
    text = "You have been banned from this application. Please contact support if you believe this is an error."
    return AuthError(403, "BANNED_USER", text)


def invalid_token() -> AuthError:
    return AuthError(400, "INVALID_TOKEN", "Invalid token")


def invalid_password() -> AuthError:
    return AuthError(400, "INVALID_PASSWORD", "Invalid password")


def no_fields() -> AuthError:
    return AuthError(400, "", "No fields to update")


def too_many(retry_after_s: int) -> AuthError:
    """With Better Auth's own header and the standard one."""
    headers = {"X-Retry-After": str(retry_after_s), "Retry-After": str(retry_after_s)}
    return AuthError(429, "", "Too many requests. Please try again later.", headers)
