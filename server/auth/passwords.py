"""Passwords in Better Auth's format: `salt:key`, scrypt, off the event loop and only so many at once."""

import asyncio
import hashlib
import hmac
import secrets
import unicodedata
from concurrent.futures import ThreadPoolExecutor

SHORTEST, LONGEST = 8, 128
"""In UTF-16 units, as JavaScript counts."""
SCRYPT_BYTES = 64 * 2**20
AT_ONCE = 4
"""Each hash takes 32 MiB and a tenth of a second of one core."""
DECOY = f"{'0' * 32}:{'0' * 128}"
"""Compared with when there is no such user, so that the answer takes as long as for one that there is."""


class Passwords:
    """Hashes and checks. Callers beyond the cap wait their turn."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="scrypt")

    async def hash(self, password: str) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._threads, hash_password, password)

    async def matches(self, stored: str | None, password: str) -> bool:
        """With nothing stored, False after the same work."""
        loop = asyncio.get_running_loop()
        matched = await loop.run_in_executor(self._threads, check_password, stored or DECOY, password)
        return matched and stored is not None

    def close(self) -> None:
        self._threads.shutdown(wait=False)


def hash_password(password: str) -> str:
    salt = secrets.token_hex(16)
    return f"{salt}:{_scrypt(password, salt).hex()}"


def check_password(stored: str, password: str) -> bool:
    """What is stored but is not of this format matches nothing."""
    salt, _, key = stored.partition(":")
    return hmac.compare_digest(_scrypt(password, salt).hex().encode(), key.encode())


def length_of(password: str) -> int:
    return len(password.encode("utf-16-le", "surrogatepass")) // 2


def _scrypt(password: str, salt: str) -> bytes:
    """The salt is the hex text itself, not the bytes it stands for."""
    text = unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
    return hashlib.scrypt(text, salt=salt.encode(), n=16384, r=16, p=1, maxmem=SCRYPT_BYTES, dklen=64)
