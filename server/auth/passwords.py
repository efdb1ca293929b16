"""Password hashing in Better Auth's format: `salt:key`, scrypt, in a small thread pool."""

import asyncio
import hashlib
import hmac
import secrets
import unicodedata
from concurrent.futures import ThreadPoolExecutor

MIN_LENGTH, MAX_LENGTH = 8, 128
"""In UTF-16 code units, as JavaScript counts."""
SCRYPT_BYTES = 64 * 2**20
THREADS = 4
"""Each hash takes 32 MiB and 0.1 s of one core."""
DECOY = f"{'0' * 32}:{'0' * 128}"
"""Compared with if there is no such user, so that the response takes as long as for an existing one."""


class Passwords:
    """Hashes and checks passwords off the event loop. Calls beyond the number of threads are queued."""

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="scrypt")

    async def hash(self, password: str) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._threads, hash_password, password)

    async def matches(self, stored: str | None, password: str) -> bool:
        """Without a stored hash: False, after the same work."""
        loop = asyncio.get_running_loop()
        matched = await loop.run_in_executor(self._threads, check_password, stored or DECOY, password)
        return matched and stored is not None

    def close(self) -> None:
        self._threads.shutdown(wait=False)


def hash_password(password: str) -> str:
    salt = secrets.token_hex(16)
    return f"{salt}:{_scrypt(password, salt).hex()}"


def check_password(stored: str, password: str) -> bool:
    """False for a stored text of another format."""
    salt, _, key = stored.partition(":")
    return hmac.compare_digest(_scrypt(password, salt).hex().encode(), key.encode())


def length_of(password: str) -> int:
    """In UTF-16 code units."""
    return len(password.encode("utf-16-le", "surrogatepass")) // 2


def _scrypt(password: str, salt: str) -> bytes:
    """As Better Auth does, the salt is the hex text itself, not the bytes it encodes."""
    text = unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
    return hashlib.scrypt(text, salt=salt.encode(), n=16384, r=16, p=1, maxmem=SCRYPT_BYTES, dklen=64)
