"""Scan a chain's text piece by piece, so that no edge between pieces hides anything.

    scanned before           new text
    ................|carry..|.........|
                    ^ window          ^
The window is read as a whole; what ends before the carry's last `LOOKBACK` characters was reported
by an earlier feed. Whatever goes wrong, the text from the window on is tainted.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from kvkeep.sharing.detector.build import build_digest
from kvkeep.sharing.detector.normalise import REPLACEMENT, View, views
from kvkeep.sharing.detector.spans import Recogniser, Span, Verdict

CARRY: Final = 320
"""Characters, invisible ones not counted, that every window takes from the text before it."""
LOOKBACK: Final = 96
"""Characters within which new text can still change what was found before it."""
WORD: Final = 64
"""Characters by which the carry may grow to begin between words."""
LONGEST_CARRY: Final = 8192
"""Characters of the original; text that hides so many invisible ones is not worth reading on."""
REMEMBERED: Final = 4096
"""Characters before the new text whose spans the context still sees."""

_LAST_GAP = re.compile(r"(?s:.)*[\W_]")
"""Up to the last character that is neither a letter nor a digit."""
_LOG = logging.getLogger(__name__)


class Context(Protocol):
    """Judges spans together."""

    @property
    def version(self) -> str:
        """Return what tells its rules from others, the same in every process."""

    def combine(self, spans: Sequence[Span]) -> list[Span]:
        """Return what the spans of the last turns mean together; offsets stay absolute."""


class Filter(Protocol):
    """An organisation's own word on what was found."""

    @property
    def version(self) -> str:
        """Return what tells its rules from others."""

    def judge(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Return the spans that count and the organisation's own; offsets into `text`."""


class Found(NamedTuple):
    """What a whole text holds."""

    spans: tuple[Span, ...]
    """In order of their start."""
    verdict: Verdict


class Window(NamedTuple):
    """What one piece of a chain holds, and the piece as recognisers read it."""

    spans: list[Span]
    view: View


class Detector:
    """Recognisers, context and an organisation's rules, made once and shared by all chains."""

    def __init__(
        self,
        recognisers: Iterable[Recogniser],
        context: Context | None = None,
        organisation: Filter | None = None,
    ) -> None:
        self.recognisers = tuple(recognisers)
        self.context = context
        self.organisation = organisation

    @property
    def version(self) -> str:
        """Name rules, weights and code; what was cleared under others may not be clear now."""
        parts = [str(getattr(part, "version", type(part).__name__)) for part in self.recognisers]
        context = [] if self.context is None else [self.context.version]
        organisation = [] if self.organisation is None else [self.organisation.version]
        whole = "\n".join([build_digest(), *parts, *context, *organisation])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def scanner(self) -> ChainScanner:
        """Return a scanner at the start of a chain."""
        return ChainScanner(self)

    def scan(self, text: str) -> Found:
        """Return what a text that stands alone holds."""
        scanner = self.scanner()
        spans = tuple(sorted(scanner.feed(text)))
        return Found(spans, scanner.verdict)

    def window(self, text: str) -> Window:
        """Return the spans of one piece of text, without context; offsets into the piece."""
        found: dict[tuple[int, int, str], Span] = {}
        readings = views(text)
        for view in readings:
            spans = [span for r in self.recognisers for span in r.spans(view.text)]
            if self.organisation is not None:
                spans = self.organisation.judge(view.text, spans)
            for span in _placed(spans, view):
                key = span.start, span.end, span.kind
                if key not in found or found[key].score < span.score:
                    found[key] = span
        return Window(list(found.values()), readings[0])


def _placed(spans: Iterable[Span], view: View) -> Iterable[Span]:
    """Yield spans of a view at their places in the original."""
    for span in spans:
        start, end = view.original(span.start, span.end)
        yield span._replace(start=start, end=end)


class ChainScanner:
    """How far one chain was scanned; `copy` where chains branch."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._carry = ""
        self._recent: tuple[Span, ...] = ()
        self._failed = False
        self.scanned = 0
        """Characters fed."""
        self.verdict = Verdict.CLEAR
        """The worst of all spans so far."""

    def copy(self) -> ChainScanner:
        """Return a scanner that goes on from here on its own."""
        other = ChainScanner(self._detector)
        other._carry, other._recent, other._failed = self._carry, self._recent, self._failed
        other.scanned, other.verdict = self.scanned, self.verdict
        return other

    def feed(self, text: str) -> tuple[Span, ...]:
        """Scan what follows and return the spans that were not reported before.

        Offsets are absolute in the chain; a span may begin in text fed earlier. Text that is empty
        or holds characters that could not be decoded is grey; an error taints from the window on.
        """
        origin = self.scanned - len(self._carry)
        old, self.scanned = self.scanned, self.scanned + len(text)
        if self._failed:
            return self._report([_failure(old, self.scanned)])
        if not text:
            return self._report([Span(old, old, "empty", "identifier", 0.5, "rule")])
        try:
            piece = self._carry + text
            window = self._detector.window(piece)
            fresh = [
                span._replace(start=span.start + origin, end=span.end + origin)
                for span in window.spans
                if span.end + origin > old - LOOKBACK
            ]
            fresh += _undecodable(window.view, origin, old)
            if self._detector.context is not None:
                fresh += self._detector.context.combine([*self._recent, *fresh])
            self._carry = carried(piece, window.view)
        except Exception:  # noqa: BLE001 - whatever it is, what could not be read stays private
            _LOG.warning("detector failed; the chain stays private from here on", exc_info=False)
            self._failed = True
            fresh = [_failure(origin, self.scanned)]
        return self._report(fresh)

    def _report(self, spans: Iterable[Span]) -> tuple[Span, ...]:
        known = set(self._recent)
        fresh = tuple(span for span in dict.fromkeys(spans) if span not in known)
        kept = (*self._recent, *fresh)
        self._recent = tuple(span for span in kept if span.end > self.scanned - REMEMBERED)
        self.verdict = max([self.verdict, *(span.verdict for span in fresh)])
        return fresh


def _failure(start: int, end: int) -> Span:
    return Span(start, end, "detector_error", "identifier", 1.0, "rule")


def _undecodable(view: View, origin: int, old: int) -> list[Span]:
    """Return one grey span over the new text from where it could not be decoded."""
    position = view.text.rfind(REPLACEMENT)
    if position < 0:
        return []
    start, end = view.original(position, position + 1)
    if end + origin <= old:
        return []
    return [Span(start + origin, end + origin, "undecodable", "identifier", 0.5, "rule")]


def carried(piece: str, view: View) -> str:
    """Return the end of a piece that the next window must begin with.

    Raises ValueError where invisible characters make it longer than `LONGEST_CARRY`.
    """
    start = max(0, len(view.text) - CARRY)
    parted = _LAST_GAP.match(view.text, max(0, start - WORD), start)
    if parted is not None:
        start = parted.end()
    start = view.original(start, start)[0] if start else 0
    if len(piece) - start > LONGEST_CARRY:
        raise ValueError("too many invisible characters to read across an edge")
    return piece[start:]
