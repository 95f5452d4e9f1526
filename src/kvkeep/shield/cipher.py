"""Seals pages with an authenticated cipher, each under a key of its own that a key source grants.

Keys come by page: HKDF gives 32 bytes of key and 32 that commit to it. The commitment is compared
before anything is decrypted, because the ciphers themselves open under more than one key.
"""

from __future__ import annotations

import functools
import hmac
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from kvkeep.errors import KvkeepError, SealError
from kvkeep.sealing import NAME_BYTES, PUBLIC_OWNER, SHELF_BYTES, Opened, SealContext
from kvkeep.shield.frame import (
    HEADER_BYTES,
    PAGE_ID_BYTES,
    FramePlan,
    Header,
    Suite,
    header_of,
    peek,
    plan_frame,
    read_header,
)
from kvkeep.types import PUBLIC_SCOPE

KEY_BYTES = 32
MATERIAL_BYTES = 2 * KEY_BYTES
"""Of a page's key: the cipher's, and what commits to it."""

_ZEROS = bytes(MATERIAL_BYTES)
_BEGIN = struct.Struct("<4sBII")
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(slots=True)
class PageKey:
    """The key of one page, for one call."""

    epoch: int
    material: memoryview
    """[64] key and commitment, writable."""
    newest: int = 0
    """The owner's newest epoch, as far as the one who granted it knows."""

    @property
    def key(self) -> memoryview:
        """Return the cipher's key."""
        return self.material[:KEY_BYTES]

    @property
    def commitment(self) -> bytes:
        """Return what proves that this is the key."""
        return bytes(self.material[KEY_BYTES:])

    def wipe(self) -> None:
        """Forget the key."""
        self.material[:] = _ZEROS


Pages = Sequence[tuple[bytes, int]]
"""(page id, generation) of each."""


class KeySource(Protocol):
    """Grants keys by owner."""

    def name_key(self, owner: str) -> bytes | None:
        """Return the key of an owner's names; never waits, None while it is not at hand."""

    def shelf_key(self) -> bytes | None:
        """Return the key by which owners are filed; never waits, None while not at hand."""

    def fresh(self, owner: str, page_id: bytes) -> PageKey:
        """Return the key of a page to be sealed, of the owner's newest epoch.

        Raises `SealError` where there is none to be had.
        """

    def known(self, owner: str, epoch: int, pages: Pages) -> list[PageKey]:
        """Return the keys of pages that were sealed; raises `SealError` where they are gone."""


class FrameSealer:
    """A `TierSealer` of frames as `kvkeep.shield.frame` arranges them."""

    def __init__(self, keys: KeySource, suite: Suite | None = None) -> None:
        self._keys = keys
        self._suite = suite or suite_of(CPU_INFO)
        self.name = self._suite.name.lower().replace("_", "-")
        self._expected: dict[_KeyName, PageKey] = {}

    def name_of(self, context: SealContext) -> bytes | None:
        """Return the page's name; None while the owner's name key is not at hand."""
        key = self._keys.name_key(_hierarchy(context))
        return _keyed(key, b"kvs1|page" + context.associated_data(), NAME_BYTES)

    def shelf_of(self, owner: str) -> bytes | None:
        """Return what stands for the owner, whatever becomes of its keys."""
        key = self._keys.shelf_key()
        return None if key is None else shelf_under(key, owner)

    def frame_bytes(self, layer_bytes: Sequence[int]) -> int:
        """Return the length of every frame of such pages."""
        return _planned(tuple(layer_bytes)).frame_bytes

    def seal(
        self,
        context: SealContext,
        page: bytes | memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> memoryview:
        """Return the page as a frame under a key of its own."""
        plan = _planned(tuple(layer_bytes))
        if len(page) != plan.plain_bytes:
            raise SealError("a page to be sealed is not as long as its layers")
        page_id = os.urandom(PAGE_ID_BYTES)
        key = self._keys.fresh(_hierarchy(context), page_id)
        try:
            header = header_of(self._suite, page_id, key.epoch, key.commitment)
            cipher = _cipher(self._suite, key.key)
        finally:
            key.wipe()
        bound = _bound(self._suite, 0, context, plan)
        plain = memoryview(page)
        frame = np.empty(plan.frame_bytes, np.uint8).data if into is None else into
        frame[:HEADER_BYTES] = header
        encrypt_into = cipher.encrypt_into
        for nonce, place, at, sealed_at, _ in plan.slices:
            encrypt_into(nonce, plain[at], bound + place, frame[sealed_at])
        return frame

    @contextmanager
    def expecting(self, frames: Sequence[tuple[SealContext, memoryview]]) -> Iterator[None]:
        """Ask for the keys of frames by owner and epoch, and wipe those that none was opened by."""
        wanted: dict[tuple[str, int], list[tuple[bytes, int]]] = {}
        for context, frame in frames:
            header = peek(frame)
            if header is not None:
                page = header.page_id, header.generation
                wanted.setdefault((_hierarchy(context), header.epoch), []).append(page)
        names: list[_KeyName] = []
        for (owner, epoch), pages in wanted.items():
            # Each is asked for again as it is opened, and says why; so are too few or too many.
            with suppress(KvkeepError, ValueError):
                keys = self._keys.known(owner, epoch, pages)
                for page, key in zip(pages, keys, strict=True):
                    names.append((owner, epoch, *page))
                    if self._expected.setdefault(names[-1], key) is not key:
                        key.wipe()  # somebody else opens the same page just now
        try:
            yield
        finally:
            for name in names:
                left = self._expected.pop(name, None)
                if left is not None:
                    left.wipe()

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        """Yield the page's layers, once their tags held."""
        plan = _planned(tuple(layer_bytes))
        header = read_header(frame, plan)
        key = self._key_of(context, header)
        try:
            if not hmac.compare_digest(header.commitment, key.commitment):
                raise SealError("a frame is sealed under another key than its reader's")
            cipher = _cipher(header.suite, key.key)
        finally:
            key.wipe()
        bound = _bound(header.suite, header.generation, context, plan)
        plain = np.empty(plan.plain_bytes, np.uint8).data if into is None else into
        unproven = 0
        decrypt_into = cipher.decrypt_into
        for nonce, place, at, sealed_at, whole in plan.slices:
            try:
                decrypt_into(nonce, frame[sealed_at], bound + place, plain[at])
            except InvalidTag:
                plain[unproven : at.stop] = bytes(at.stop - unproven)
                raise SealError("a frame was changed, or belongs to another page") from None
            if whole:
                yield plain[unproven : at.stop]
                unproven = at.stop
        return key.newest > header.epoch

    def _key_of(self, context: SealContext, header: Header) -> PageKey:
        """Return the key a frame says it is sealed under, asked for before or now."""
        owner, page = _hierarchy(context), (header.page_id, header.generation)
        expected = self._expected.pop((owner, header.epoch, *page), None)
        return expected or self._keys.known(owner, header.epoch, (page,))[0]


_KeyName = tuple[str, int, bytes, int]
"""Owner, epoch, page id and generation."""

Cipher = AESGCM | ChaCha20Poly1305


def suite_of(cpu_info: Path) -> Suite:
    """Return the faster cipher of a machine: AES where its processor has instructions for it."""
    if not cpu_info.exists():
        return Suite.AES_256_GCM
    flags = (
        line.partition(":")[2].split()
        for line in cpu_info.read_text(encoding="utf-8").splitlines()
        if line.startswith(("flags", "Features"))
    )
    return Suite.AES_256_GCM if "aes" in next(flags, ()) else Suite.CHACHA20_POLY1305


def _cipher(suite: Suite, key: memoryview) -> Cipher:
    return AESGCM(key) if suite is Suite.AES_256_GCM else ChaCha20Poly1305(key)


def shelf_under(key: bytes, owner: str) -> bytes:
    """Return what an owner's pages are filed under by a store's shelf key."""
    return hmac.digest(key, b"kvs1|shelf" + owner.encode(), "sha256")[:SHELF_BYTES]


def _keyed(key: bytes | None, what: bytes, size: int) -> bytes | None:
    return None if key is None else hmac.digest(key, what, "sha256")[:size]


def _hierarchy(context: SealContext) -> str:
    """Return whose keys seal the page: public pages have their own, whoever computed them."""
    return PUBLIC_OWNER if context.tag.scope == PUBLIC_SCOPE else context.owner


def _bound(suite: Suite, generation: int, context: SealContext, plan: FramePlan) -> bytes:
    """Return what each slice's associated data begins with; the reader makes it anew."""
    page = context.associated_data()
    return _BEGIN.pack(b"kvs1", suite, len(page), generation) + page + plan.sizes


@functools.lru_cache(maxsize=64)
def _planned(layer_bytes: tuple[int, ...]) -> FramePlan:
    return plan_frame(layer_bytes)
