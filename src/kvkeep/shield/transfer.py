"""Keys of one transfer: from a random key that its two ends are given, and nobody else has."""

from __future__ import annotations

from typing import Final

from kvkeep.errors import KeysGone, SealError
from kvkeep.shield import envelope
from kvkeep.shield.cipher import PageKey, Pages
from kvkeep.shield.envelope import KEY_BYTES

EPOCH: Final = 0
"""Of every frame on its way; pages below memory begin with 1."""


class TransferKeys:
    """A `KeySource` for one transfer; its frames have no names and lie on no shelf."""

    def __init__(self, key: bytes) -> None:
        """`key` [32] is random; raises `SealError` for what is none."""
        if len(key) != KEY_BYTES:
            raise SealError("a transfer has no key; whoever asks for it gives both workers one")
        self._key = key

    def name_key(self, owner: str) -> None:
        """Return None."""

    def shelf_key(self) -> None:
        """Return None."""

    def fresh(self, owner: str, page_id: bytes) -> PageKey:
        """Return the key of a frame to be sealed."""
        return PageKey(EPOCH, self._material(page_id))

    def known(self, owner: str, epoch: int, pages: Pages) -> list[PageKey]:
        """Return the keys of frames that came; raises `KeysGone` for one of a tier."""
        if epoch != EPOCH or any(generation for _, generation in pages):
            raise KeysGone("a frame was not sealed for this transfer")
        return [PageKey(EPOCH, self._material(page_id)) for page_id, _ in pages]

    def _material(self, frame_id: bytes) -> memoryview:
        return memoryview(bytearray(envelope.transfer_material(self._key, frame_id)))
