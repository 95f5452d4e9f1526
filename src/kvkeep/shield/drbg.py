"""Random choices from a key: HKDF for each purpose, AES-256 in counter mode, nothing else's state.

Every draw is uniform: what would favour small numbers is drawn again. No generator of numpy or
torch takes part: their output tells their state.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES: Final = 32
_SALT: Final = b"kvkeep-transform-1"
_BLOCK_BYTES: Final = 1024
_WORD: Final = 1 << 16


def derive(key: bytes, *purpose: str | int) -> bytes:
    """Return 32 bytes for one purpose, independent of those for any other."""
    parts = [str(part).encode() for part in purpose]
    info = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=_SALT, info=info).derive(key)


class Stream:
    """The random choices of one derived key, the same every time."""

    def __init__(self, key: bytes) -> None:
        # The counter begins at 0 under a key that is used for this stream alone.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._left = b""

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        while len(self._left) < count:
            self._left += self._cipher.update(bytes(_BLOCK_BYTES))
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def below(self, limit: int) -> int:
        """Return a number in 0..limit-1, limit at most 65,536, each as likely."""
        last = _WORD - _WORD % limit
        while (drawn := int.from_bytes(self.take(2), "little")) >= last:
            pass
        return drawn % limit

    def permutation(self, count: int) -> NDArray[np.int32]:
        """Return a permutation of 0..count-1, each as likely (Fisher and Yates)."""
        found = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            found[last], found[other] = found[other], found[last]
        return np.array(found, np.int32)

    def signs(self, count: int) -> NDArray[np.float64]:
        """Return ones and minus ones, each as likely."""
        bits = np.unpackbits(np.frombuffer(self.take(-(-count // 8)), np.uint8))[:count]
        return 1.0 - 2.0 * bits.astype(np.float64)

    def normals(self, count: int) -> NDArray[np.float64]:
        """Return numbers of a standard normal distribution (Box and Muller, 53 bits each)."""
        pairs = -(-count // 2)
        words = np.frombuffer(self.take(16 * pairs), np.uint64).reshape(2, pairs) >> np.uint64(11)
        first, second = (words.astype(np.float64) + 0.5) / 2.0**53
        radius = np.sqrt(-2.0 * np.log(first))
        both = np.concatenate(
            [radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)]
        )
        return both[:count]
