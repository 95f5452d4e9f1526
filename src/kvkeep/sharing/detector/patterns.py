"""RE2, typed: patterns that never backtrack, and many of them tried in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from re2 import Options, Set, _re2

from kvkeep.errors import ConfigError

_MOST_BYTES: Final = 64 << 20
"""Most memory an automaton may take, a `PatternSet`'s always; it is taken as texts need it."""
_PATTERN_BYTES: Final = 8 << 20
_STEP_BYTES: Final = 1024
"""Of a `Pattern`, and for each step of its program: one that gets too little for a few states is
searched without an automaton, forty times as slowly."""
_ANYWHERE: Final = _re2.RE2.Anchor.UNANCHORED


class Hit(NamedTuple):
    """One match: its whole extent and that of its value, in bytes of UTF-8."""

    start: int
    end: int
    value: tuple[int, int]
    """First group that took part; the whole match where there is none."""


class Pattern:
    """One pattern over UTF-8."""

    def __init__(self, text: str) -> None:
        # The extension itself: its wrapper in Python takes longer than most searches.
        data = text.encode()
        compiled = _re2.RE2(data, _options(_PATTERN_BYTES))
        if not compiled.ok():
            raise ConfigError(
                f"pattern {text!r} is refused: {_words(compiled.error())}; write it without "
                "look-around and back-references, which need backtracking"
            )
        wanted = min(compiled.ProgramSize() * _STEP_BYTES, _MOST_BYTES)
        if wanted > _PATTERN_BYTES:
            compiled = _re2.RE2(data, _options(wanted))
        self._match = compiled.Match
        self.groups: int = compiled.NumberOfCapturingGroups()

    def search(self, data: bytes, start: int = 0) -> Hit | None:
        """Return the leftmost match that begins at or after a byte."""
        size = len(data)
        if start > size:
            return None
        spans = self._match(_ANYWHERE, data, start, size)
        whole = spans[0]
        first, last = whole
        if first < 0:
            return None
        for group in spans[1:]:
            if group[0] >= 0:
                return Hit(first, last, group)
        return Hit(first, last, whole)

    def hits(self, data: bytes) -> Iterator[Hit]:
        """Yield matches from left to right, none inside another."""
        hit = self.search(data)
        while hit is not None:
            yield hit
            hit = self.search(data, max(hit.end, hit.start + 1))


class PatternSet:
    """Tells which of many patterns match somewhere in a text, in one pass over it."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._set = Set.SearchSet(_options(_MOST_BYTES))
        for pattern in patterns:
            self._set.Add(pattern)
        # At the end alone: what matches at every byte is noted at every byte.
        self._witness = self._set.Add(r"\z")
        self._set.Compile()
        self._all = tuple(range(len(patterns)))
        self._none = [self._witness]

    def matching(self, data: bytes) -> Sequence[int]:
        """Return the indices of the patterns that may match.

        A pass that ran out of memory reports nothing, not even the pattern that matches every
        text; then all indices are returned.
        """
        found: list[int] | None = self._set.Match(data)
        if found == self._none:
            return []
        if found is None or self._witness not in found:
            return self._all
        found.remove(self._witness)
        found.sort()
        return found


def _options(most_bytes: int) -> Options:
    options = Options()
    options.log_errors = False
    options.max_mem = most_bytes
    return options


def _words(reason: object) -> str:
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
