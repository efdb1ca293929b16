"""The server's one secret, and what it makes: signatures, hashed and sealed tokens."""

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
    """Better Auth's `secret`: cookies that were signed with it elsewhere go on working here."""

    text: str = field(repr=False)

    def sign(self, value: str) -> str:
        """`value.signature`, not yet percent-encoded."""
        return f"{value}.{base64.b64encode(self._mac(value)).decode()}"

    def unsign(self, signed: str) -> str | None:
        """The value, or None if this secret did not sign it. Takes the percent-encoded form as well."""
        text = unquote(signed) if "%" in signed else signed  # never unquote_plus: base64 has a `+`
        value, _, signature = text.rpartition(".")
        if not value or len(signature) != SIGNATURE_LENGTH or not signature.endswith("="):
            return None
        return value if hmac.compare_digest(self.sign(value).encode(), text.encode()) else None

    def seal(self, token: str, session_id: str) -> str:
        """The token, readable with the secret only. A session id is used once, so its pad is too."""
        return self._xor(token.encode(), session_id).hex()

    def unseal(self, sealed: str, session_id: str) -> str:
        return self._xor(bytes.fromhex(sealed), session_id).decode()

    def _xor(self, data: bytes, session_id: str) -> bytes:
        key = self._mac(f"session token\0{session_id}")
        pad = hashlib.shake_256(key).digest(len(data))
        return bytes(a ^ b for a, b in zip(data, pad, strict=True))

    def _mac(self, value: str) -> bytes:
        return hmac.digest(self.text.encode(), value.encode(), "sha256")


def load(data: Path, environment: Mapping[str, str] = os.environ) -> Secret:
    """`PLANTAIN_SECRET` or `BETTER_AUTH_SECRET`; else the one in the data folder, made on the first start."""
    chosen = environment.get("PLANTAIN_SECRET") or environment.get("BETTER_AUTH_SECRET")
    return Secret(chosen or _kept(data / "secret"))


def random_token(length: int = TOKEN_LENGTH) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def hash_of(token: str) -> str:
    """A token has 190 random bits, so no slow hash is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def _kept(path: Path) -> str:
    """Readable by its owner alone from the very first byte; two servers that start at once agree on it."""
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
