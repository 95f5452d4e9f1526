"""Sealed frames by the book: the standard library's HMAC and one whole pass, the slow oracle."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from kvkeep.sealing import SealContext

SLICE = 262_144


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3."""
    done, block, counter = b"", b"", 1
    while len(done) < length:
        block = hmac.new(key, block + info + bytes([counter]), hashlib.sha256).digest()
        done, counter = done + block, counter + 1
    return done[:length]


def pieces(sizes: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """(first layer, last layer, part, slice, bytes) of every slice."""
    parts: list[list[int]] = []
    for layer, size in enumerate(sizes):
        if parts and sum(sizes[i] for i in parts[-1]) + size <= SLICE:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    found = []
    for number, part in enumerate(parts):
        left, tile = sum(sizes[i] for i in part), 0
        while left:
            length = min(left, SLICE)
            found.append((part[0], part[-1] + 1, number, tile, length))
            left, tile = left - length, tile + 1
    return found


def seal(
    epoch_key: bytes,
    page_id: bytes,
    epoch: int,
    generation: int,
    suite: int,
    context: SealContext,
    layers: Sequence[bytes],
) -> bytes:
    """One page as a frame."""
    okm = hkdf_expand(epoch_key, b"kvs1|page" + page_id + struct.pack("<I", generation), 64)
    cipher = AESGCM(okm[:32]) if suite == 1 else ChaCha20Poly1305(okm[:32])
    frame = b"KVS1" + bytes([suite, 0, 0, 0]) + page_id
    frame += struct.pack("<II", epoch, generation) + okm[32:]
    page = context.associated_data()
    sizes = [len(layer) for layer in layers]
    bound = b"kvs1" + bytes([suite]) + struct.pack("<II", len(page), generation) + page
    bound += struct.pack("<I", len(sizes))
    bound += b"".join(struct.pack("<I", size) for size in sizes)
    plain, at = b"".join(layers), 0
    for first, last, part, tile, length in pieces(sizes):
        nonce = struct.pack("<III", first, part, tile)
        data = bound + struct.pack("<IIII", part, tile, first, last)
        frame += cipher.encrypt(nonce, plain[at : at + length], data)
        at += length
    return frame
