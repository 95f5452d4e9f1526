"""A codec's run over a suite, a piece after the other: each says how far it is and is kept.

Pieces that ended are kept in `build/quality`, by commit; what items score depends neither on
the piece they are in nor on those that an engine answered before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import msgspec

from bench.kept import BUILD, Kept
from bench.quality_run import WAVE, Asked, Item, Machine, run
from bench.quality_suite import Context
from kvkeep.cli.console import NOTES
from kvkeep.eviction.policy import Evictor
from kvkeep.quant.baselines.base import Dequantised
from kvkeep.quant.codec import Codec, Float

FOLDER: Final = BUILD / "quality"
CONTEXTS: Final = 3 * WAVE
"""Of a piece; waves are what they are without pieces."""


class Piece(msgspec.Struct, frozen=True):
    """What some contexts came to."""

    items: list[Item]
    seconds: float
    stored_bytes: int
    """Of closed pages, or of one where all are of one size."""
    float_bytes: int
    """That they would take in the model's dtype."""
    prompt_tokens: int
    kept_tokens: float
    """Of prompts that might lose some, at their ends."""


@dataclass(frozen=True, slots=True)
class Found:
    """A codec's run."""

    items: list[Item]
    seconds: float
    bytes_ratio: float
    """Stored bytes of closed pages over bfloat16's."""
    kept: float
    """Of prompts' tokens, at their ends."""


class Run:
    """One codec's engine, made where the first piece is not kept."""

    def __init__(self, machine: Machine, codec: Codec, evictor: Evictor | None = None) -> None:
        self._machine = machine
        self._codec = codec
        self._evictor = evictor

    @cached_property
    def asked(self) -> Asked:
        """Return the engine."""
        return Asked(self._machine, self._codec, evictor=self._evictor)

    def piece(self, contexts: Sequence[Context], first: int) -> Piece:
        """Answer some contexts, the first of which has this number."""
        stored, plain = self._sizes()
        seen, left = self.asked.prompts
        begun = time.perf_counter()
        items = run(self.asked, contexts, first)
        seconds = time.perf_counter() - begun
        now = self._sizes()
        if isinstance(self._codec, Dequantised):
            now = now[0] - stored, now[1] - plain
        after = self.asked.prompts
        return Piece(items, seconds, *now, after[0] - seen, after[1] - left)

    def _sizes(self) -> tuple[int, int]:
        """Return bytes with the codec and without: of what a baseline has coded, else of a page."""
        if isinstance(self._codec, Dequantised):
            return self._codec.stored_bytes, self._codec.float_bytes
        stored, plain = (one.page_spec(self.asked.shape) for one in (self._codec, Float()))
        return stored.page_bytes, plain.page_bytes


def answered(
    name: str,
    machine: Machine,
    contexts: Sequence[Context],
    codec: Codec,
    evictor: Evictor | None = None,
    folder: Path | None = FOLDER,
) -> Found:
    """Return one codec's run, `name` by which its pieces are kept; `folder` None: they are not."""
    own, pieces = Run(machine, codec, evictor), list[Piece]()
    for begin in range(0, len(contexts), CONTEXTS):
        some = contexts[begin : begin + CONTEXTS]
        measure = partial(own.piece, some, begin)
        if folder is None:
            pieces.append(measure())
        else:
            pieces.append(Kept(Piece, folder).got(f"{name}-{begin:03}", measure))
        took = sum(piece.seconds for piece in pieces)
        NOTES.print(f"{name}: {begin + len(some)} of {len(contexts)} contexts, {took:.0f} s")
    return joined(pieces)


def joined(pieces: Sequence[Piece]) -> Found:
    """Return a run of its pieces."""
    seen = sum(piece.prompt_tokens for piece in pieces)
    return Found(
        [item for piece in pieces for item in piece.items],
        sum(piece.seconds for piece in pieces),
        sum(piece.stored_bytes for piece in pieces) / sum(piece.float_bytes for piece in pieces),
        sum(piece.kept_tokens for piece in pieces) / seen if seen else 1.0,
    )
