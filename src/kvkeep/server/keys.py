"""API keys `kvk_<id>_<secret>_<checksum>`: made once, shown once, kept as a digest."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARS = 12
_SECRET_CHARS = 43
"""43 characters of 62 hold 256 bits."""
_CHECK_CHARS = 6
_PATTERN = re.compile(
    rf"kvk_([0-9A-Za-z]{{{_ID_CHARS}}})_([0-9A-Za-z]{{{_SECRET_CHARS}}})_([0-9A-Za-z]{{{_CHECK_CHARS}}})"
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A whole key, in the clear; `repr` shows its public id alone."""

    id: str
    text: str

    def __repr__(self) -> str:
        return f"ApiKey(id={self.id!r})"


def new_key() -> ApiKey:
    """Return a fresh random key."""
    key_id = _random(_ID_CHARS)
    head = f"kvk_{key_id}_{_random(_SECRET_CHARS)}"
    return ApiKey(key_id, f"{head}_{_checksum(head)}")


def parse_key(text: str) -> ApiKey | None:
    """Return the key, or None where its form or its checksum is wrong."""
    match = _PATTERN.fullmatch(text)
    if match is None or _checksum(text.rpartition("_")[0]) != match[3]:
        return None
    return ApiKey(match[1], text)


def key_digest(text: str) -> str:
    """Return what is stored: SHA-256 in hex (256 random bits need no slow hash)."""
    return hashlib.sha256(text.encode()).hexdigest()


def same_digest(a: str, b: str) -> bool:
    """Compare two digests in constant time."""
    return hmac.compare_digest(a.encode(), b.encode())


def same_secret(presented: str, expected: str) -> bool:
    """Compare two secrets in constant time, whatever their lengths."""
    return same_digest(key_digest(presented), key_digest(expected))


def _random(chars: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(chars))


def _checksum(head: str) -> str:
    value, digits = zlib.crc32(head.encode()), ""
    for _ in range(_CHECK_CHARS):
        value, digit = divmod(value, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
