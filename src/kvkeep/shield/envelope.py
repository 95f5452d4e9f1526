"""The key hierarchy's arithmetic: how keys wrap keys, and what is derived from them.

A provider's key wraps an owner's root, the root wraps the owner's name key and one key per epoch,
and an epoch's key gives each page its own by HKDF. Roots, name and epoch keys are random: whoever
destroys a wrapped root destroys all below it, which keys derived from a master would not allow.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from kvkeep.errors import SealError

KEY_BYTES = 32
PAGE_MATERIAL_BYTES = 64
NONCE_BYTES = 12
TAG_BYTES = 16
WRAPPED_BYTES = 1 + NONCE_BYTES + KEY_BYTES + TAG_BYTES

_VERSION = b"\x01"
_SHA256 = hashes.SHA256()

Secret = bytes | bytearray | memoryview


def label_of(purpose: str, *parts: str | bytes | int) -> bytes:
    """Return what a wrapped key is bound to, unlike for any two different lists of parts."""
    framed = [b"kvs1|" + purpose.encode()]
    for part in parts:
        raw = part.to_bytes(8, "little") if isinstance(part, int) else part
        raw = raw.encode() if isinstance(raw, str) else raw
        framed.append(len(raw).to_bytes(4, "little") + raw)
    return b"".join(framed)


class StoreLabels(NamedTuple):
    """What a store's own keys are bound to."""

    signing: bytes
    shelf: bytes


def store_labels(store_id: str) -> StoreLabels:
    """Return what a store's own wrapped keys are bound to."""
    return StoreLabels(label_of("signing", store_id), label_of("shelf", store_id))


def root_label(owner: str, key_id: str) -> bytes:
    """Return what a wrapped root is bound to."""
    return label_of("root", owner, key_id)


def name_label(owner: str, key_id: str) -> bytes:
    """Return what a wrapped name key is bound to."""
    return label_of("name", owner, key_id)


def epoch_label(owner: str, key_id: str, epoch: int) -> bytes:
    """Return what a wrapped epoch key is bound to."""
    return label_of("dek", owner, key_id, epoch)


def model_label(model_id: str) -> bytes:
    """Return what a wrapped model key is bound to: never a root's label, nor any other's."""
    return label_of("model", model_id)


def wrap(key: Secret, inner: Secret, label: bytes) -> bytes:
    """Return `inner` [32] wrapped under `key` [32], bound to a label."""
    nonce = os.urandom(NONCE_BYTES)
    return _VERSION + nonce + AESGCM(key).encrypt(nonce, inner, label)


def unwrap(key: Secret, wrapped: bytes, label: bytes, into: memoryview) -> None:
    """Write what was wrapped into 32 bytes; raises `SealError` where it is another's or changed."""
    if len(wrapped) != WRAPPED_BYTES or wrapped[:1] != _VERSION:
        raise SealError("a wrapped key is of another form or version")
    nonce, rest = wrapped[1 : 1 + NONCE_BYTES], wrapped[1 + NONCE_BYTES :]
    try:
        AESGCM(key).decrypt_into(nonce, rest, label, into)
    except InvalidTag:
        into[:] = bytes(len(into))
        raise SealError("a wrapped key was changed, or was wrapped by another key") from None


def page_material(epoch_key: Secret, page_id: bytes, generation: int) -> bytes:
    """Return a page's key [32] and its commitment [32]: HKDF-Expand-SHA256 of the epoch's key."""
    info = b"kvs1|page" + page_id + generation.to_bytes(4, "little")
    return HKDFExpand(_SHA256, PAGE_MATERIAL_BYTES, info).derive(epoch_key)


def worker_key(name_key: Secret, worker: str) -> bytes:
    """Return what wraps the roots of one worker's store [32], from its name key in the cluster's.

    Random as that one is, so that a worker's key tells nothing of another's.
    """
    return HKDFExpand(_SHA256, KEY_BYTES, b"kvs1|worker|" + worker.encode()).derive(name_key)


def transfer_material(key: Secret, frame_id: bytes) -> bytes:
    """Return the key [32] of one frame of a transfer, and its commitment [32]."""
    return HKDFExpand(_SHA256, PAGE_MATERIAL_BYTES, b"kvs1|transfer" + frame_id).derive(key)


def model_material(model_key: Secret, what: bytes) -> bytes:
    """Return the key [32] of one part of a sealed checkpoint, and its commitment [32]."""
    return HKDFExpand(_SHA256, PAGE_MATERIAL_BYTES, b"kvs1|model|" + what).derive(model_key)
