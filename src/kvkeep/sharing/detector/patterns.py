"""RE2, typed: patterns that never backtrack, and many of them tried in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import re2

from kvkeep.errors import ConfigError

_SET_BYTES: Final = 64 << 20
"""Most memory the automaton of a `PatternSet` may take; it is taken as texts need it."""


class Hit(NamedTuple):
    """One match: its whole extent and that of its value, in bytes of UTF-8."""

    start: int
    end: int
    value: tuple[int, int]
    """First group that took part; the whole match where there is none."""


class Pattern:
    """One pattern over UTF-8."""

    def __init__(self, text: str) -> None:
        try:
            self._compiled = re2.compile(text, _quiet())
        except re2.error as error:
            reason = error.args[0] if error.args else "unknown"
            raise ConfigError(
                f"pattern {text!r} is refused: {_words(reason)}; write it without look-around "
                "and back-references, which need backtracking"
            ) from None

    def search(self, data: bytes, start: int = 0) -> Hit | None:
        """Return the leftmost match that begins at or after a byte."""
        match = self._compiled.search(data, start) if start <= len(data) else None
        if match is None:
            return None
        spans = (match.span(group) for group in range(1, self._compiled.groups + 1))
        value = next((span for span in spans if span[0] >= 0), match.span())
        start, end = match.span()
        return Hit(start, end, value)

    def hits(self, data: bytes) -> Iterator[Hit]:
        """Yield matches from left to right, none inside another."""
        hit = self.search(data)
        while hit is not None:
            yield hit
            hit = self.search(data, max(hit.end, hit.start + 1))


class PatternSet:
    """Tells which of many patterns match somewhere in a text, in one pass over it."""

    def __init__(self, patterns: Sequence[str]) -> None:
        options = _quiet()
        options.max_mem = _SET_BYTES
        self._set = re2.Set.SearchSet(options)
        for pattern in patterns:
            self._set.Add(pattern)
        self._witness = self._set.Add("")
        self._set.Compile()
        self._all = tuple(range(len(patterns)))

    def matching(self, data: bytes) -> Sequence[int]:
        """Return the indices of the patterns that may match.

        A pass that ran out of memory reports nothing, not even the pattern that matches every
        text; then all indices are returned.
        """
        found = self._set.Match(data)
        if found is None or self._witness not in found:
            return self._all
        return sorted(index for index in found if index != self._witness)


def _quiet() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    return options


def _words(reason: object) -> str:
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
