"""The server's secret: cookie signatures and encrypted session tokens; random tokens and their hashes."""

import base64
import hashlib
import hmac
import os
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

ALPHABET = string.ascii_letters + string.digits
TOKEN_LENGTH = 32
SIGNATURE_LENGTH = 44


@dataclass(frozen=True)
class Secret:
    """Better Auth's `secret`: cookies that another server signed with it are valid here too."""

    text: str = field(repr=False)

    def sign(self, value: str) -> str:
        """`value.signature` (HMAC-SHA256, base64), not percent-encoded."""
        return f"{value}.{base64.b64encode(self._mac(value)).decode()}"

    def unsign(self, signed: str) -> str | None:
        """The value, or None if it was not signed with this secret. Accepts the percent-encoded form too."""
        text = unquote(signed) if "%" in signed else signed  # never unquote_plus: base64 has a `+`
        value, _, signature = text.rpartition(".")
        if not value or len(signature) != SIGNATURE_LENGTH or not signature.endswith("="):
            return None
        return value if hmac.compare_digest(self.sign(value).encode(), text.encode()) else None

    def seal(self, token: str, session_id: str) -> str:
        """Encrypts a token with a one-time pad derived from the secret and the session id, which is never reused."""
        return self._xor(token.encode(), session_id).hex()

    def unseal(self, sealed: str, session_id: str) -> str:
        """Decrypts what `seal` returned."""
        return self._xor(bytes.fromhex(sealed), session_id).decode()

    def _xor(self, data: bytes, session_id: str) -> bytes:
        key = self._mac(f"session token\0{session_id}")
        pad = hashlib.shake_256(key).digest(len(data))
        return bytes(a ^ b for a, b in zip(data, pad, strict=True))

    def _mac(self, value: str) -> bytes:
        return hmac.digest(self.text.encode(), value.encode(), "sha256")


def load(data: Path, environment: Mapping[str, str] = os.environ) -> Secret:
    """`PLANTAIN_SECRET` or `BETTER_AUTH_SECRET`; else the one in the data folder, created on the first start."""
    chosen = environment.get("PLANTAIN_SECRET") or environment.get("BETTER_AUTH_SECRET")
    return Secret(chosen or _stored_secret(data / "secret"))


def random_token(length: int = TOKEN_LENGTH) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def hash_of(token: str) -> str:
    """SHA-256 in hex. A token has 190 random bits, so no slow hash is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def _stored_secret(path: Path) -> str:
    """The secret in `path`, created if missing: mode 0600 from the start, and atomically, for concurrent starts."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(random_token(48) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text().strip()
