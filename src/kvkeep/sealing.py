"""What a page below memory is bound to, and the seam to what seals it: no torch, like `types`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kvkeep.types import PageKind, PageTag

NAME_BYTES = 24
"""Of a sealed page's name."""

SHELF_BYTES = 16
"""Of what stands for an owner where sealed pages lie."""

_LENGTHS = struct.Struct("<6I")
_KIND = struct.Struct("<I")

PUBLIC_OWNER = "*public"
"""Owner of public pages; no account can be called so."""


@dataclass(frozen=True, slots=True)
class SealContext:
    """What a sealed page is bound to; rebuilt by its reader, never read from the frame."""

    owner: str
    """The account that pays for the page, whose keys seal it, or `PUBLIC_OWNER`."""
    tag: PageTag
    chain_hash: bytes
    model_digest: bytes
    spec_digest: bytes
    """Of how the page's bytes are arranged: form, sizes, order of a machine's tiles."""
    kind: PageKind = PageKind.PLAIN

    def associated_data(self) -> bytes:
        """Return the bytes that a seal authenticates: all lengths, then all parts."""
        owner, tag = self.owner.encode(), _digest(self.tag)
        chain, model, spec = self.chain_hash, self.model_digest, self.spec_digest
        kind = _KIND.pack(self.kind)
        lengths = _LENGTHS.pack(len(owner), len(tag), len(chain), len(model), len(spec), len(kind))
        return b"".join((lengths, owner, tag, chain, model, spec, kind))


@functools.lru_cache(maxsize=4096)
def _digest(tag: PageTag) -> bytes:
    return tag.digest()


@dataclass(frozen=True, slots=True)
class KeyState:
    """Who holds the keys that seal pages, and how that one stands."""

    provider: str
    memory: str
    """How the key process's memory is kept from others."""
    running: bool
    answering: bool
    """Whether keys were to be had when they were last asked for."""
    starts: int = 0


Opened = Generator[memoryview, None, bool]
"""A page's layers one after another, those together that are proven at a time; returns whether its
owner seals under a newer key by now."""


def layers_of(opening: Iterable[memoryview], layer_bytes: Iterable[int]) -> list[memoryview]:
    """Return a page's layers, each by itself."""
    sizes, layers = iter(layer_bytes), []
    for run in opening:
        at = 0
        while at < len(run):
            size = next(sizes)
            layers.append(run[at : at + size])
            at += size
    return layers


class PageSealer(Protocol):
    """Turns pages into frames that say nothing, and back; a step may ask for names alone."""

    name: str

    def name_of(self, context: SealContext) -> bytes | None:
        """Return the page's name, 24 bytes, keyed by its owner; never waits.

        None while the owner's keys are not at hand: such a page is a miss.
        """

    def shelf_of(self, owner: str) -> bytes | None:
        """Return 16 bytes that all of an owner's pages are filed under; keyed, never waits.

        They stay the same for an owner whose keys were destroyed. None: no keys are at hand.
        """

    def frame_bytes(self, layer_bytes: Sequence[int]) -> int:
        """Return how long every frame of pages with layers of these sizes is."""

    def seal(
        self,
        context: SealContext,
        page: bytes | memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> memoryview:
        """Return a page, its layers one after another, as a frame.

        It lies in `into`, as long as the frame, or in memory of its own. May wait for keys.
        Raises `SealError` where there are none.
        """

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        """Yield a page's layers in order, some whole ones at a time, as soon as they are open.

        They lie in `into`, as long as the page, or in memory of the page's own. May wait for keys.
        Raises `SealError` where the frame is another context's, was changed, or its keys are gone:
        nothing of a layer is yielded before its bytes are proven.
        """


class TierSealer(PageSealer, Protocol):
    """One whose frames lie below memory, and are opened several at a time."""

    def expecting(
        self, frames: Sequence[tuple[SealContext, memoryview]]
    ) -> AbstractContextManager[None]:
        """Get the keys of frames that are opened within it together; raises nothing.

        Where that fails, opening each says why.
        """
