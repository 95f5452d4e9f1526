"""When a sequence ends by what it says: stop strings across token edges, token ids, end of text.

Text goes in piece by piece; what comes out is safe to send: never a part of a stop string.

    seen so far   ........ never a stop ........|.. could become one ..|
                  emitted                        held back
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvkeep.engine.api import SamplingParams


class Emitted(NamedTuple):
    """Text that may be sent now, and the stop string found, if any."""

    text: str
    match: str | None = None


class StopStrings:
    """Finds the first stop string to be complete in a text that arrives in pieces.

    Of several that end at the same character the longest counts, so the result does not depend on
    where the pieces are cut.
    """

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        self._stops = tuple(s for s in dict.fromkeys(stops) if s)
        self._longest = max(map(len, self._stops), default=0)
        self._include = include
        self._held = ""

    @property
    def held(self) -> str:
        """Text kept back because it may be the start of a stop string."""
        return self._held

    def push(self, piece: str, *, search: bool = True) -> Emitted:
        """Take more text; `search=False` lets every match that begins in it pass."""
        text = self._held + piece
        if not search or not self._stops:
            self._held = ""
            return Emitted(text)
        found = self._earliest(text)
        if found is not None:
            start, stop = found
            self._held = ""
            return Emitted(text[: start + len(stop) if self._include else start], stop)
        keep = self._overhang(text)
        self._held = text[len(text) - keep :]
        return Emitted(text[: len(text) - keep])

    def flush(self) -> str:
        """Return what was held back, at the end of a sequence that no stop string ended."""
        text, self._held = self._held, ""
        return text

    def _earliest(self, text: str) -> tuple[int, str] | None:
        """Return where the first stop string to be complete begins."""
        places = [(text.find(s), s) for s in self._stops]
        ends = [(start + len(s), start, s) for start, s in places if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _overhang(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[len(text) - size :]
            if any(s.startswith(tail) for s in self._stops):
                return size
        return 0


class StopVerdict(NamedTuple):
    """What one generated token adds: text to send, and whether and by what the sequence ends."""

    text: str
    stopped: bool = False
    match: str | int | None = None
    """The stop string or stop token id that ended it; None for the end-of-text token."""


class StopChecker:
    """Decides after each generated token whether a sequence ends, and which text may be sent."""

    def __init__(self, params: SamplingParams, eos_ids: Iterable[int]) -> None:
        self._strings = StopStrings(params.stop, include=params.include_stop)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._include = params.include_stop
        self._min_tokens = params.min_tokens
        self._tokens = 0

    def ends_with(self, token_id: int) -> bool:
        """Tell whether this next token ends the sequence by itself (its text is then not sent)."""
        ends = token_id in self._stop_ids or token_id in self._eos_ids
        return ends and self._tokens >= self._min_tokens

    def push(self, token_id: int, piece: str) -> StopVerdict:
        """Take the next token and the text it completed; an ending token's own is left out."""
        if self.ends_with(token_id):
            self._tokens += 1
            match = token_id if token_id in self._stop_ids else None
            kept = self._strings.push(piece if self._include else "", search=False)
            return StopVerdict(kept.text, True, match)
        self._tokens += 1
        emitted = self._strings.push(piece, search=self._tokens >= self._min_tokens)
        return StopVerdict(emitted.text, emitted.match is not None, emitted.match)

    def finish(self, piece: str = "") -> StopVerdict:
        """Take the last text of a sequence that ends otherwise (length, deadline)."""
        emitted = self._strings.push(piece, search=self._tokens >= self._min_tokens)
        return StopVerdict(
            emitted.text + self._strings.flush(), emitted.match is not None, emitted.match
        )
