"""Find spans by rules: passes over many patterns at once, then each one's own conditions.

A text is spared the passes over patterns that need characters it lacks. Rules that find nothing
without a word near are tried where their pattern and such a word both stand somewhere.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import ceil, log2
from typing import Final, NamedTuple

from kvkeep.sharing.detector.catalogue import Rule
from kvkeep.sharing.detector.checks import CHECKS
from kvkeep.sharing.detector.loosen import loosened, shape
from kvkeep.sharing.detector.needs import DIGIT, needs, offers
from kvkeep.sharing.detector.patterns import Hit, Pattern, PatternSet
from kvkeep.sharing.detector.spans import Span

_WITHIN_NUMBERS: Final = frozenset(" -.")
DENY_REACH: Final = 16
"""Characters before a value in which a denying word counts."""
TOGETHER: Final = 160
"""Most rules of one pass: more passes take longer, larger automata meet new states for longer."""
_RUNS: Final = {
    "word": re.compile(rb"[0-9A-Za-z]*"),
    "digit": re.compile(rb"[0-9]*"),
    "number": re.compile(rb"[0-9]*"),
}
"""By edge, what a value can't begin within."""


def entropy_bits(text: str) -> float:
    """Return the Shannon entropy of a text in bits per character."""
    length = len(text)
    return -sum(n / length * log2(n / length) for n in Counter(text).values())


def words_pattern(words: Sequence[str], *, loose: bool = False) -> str:
    """Return a pattern for any of some whole words in any case; `*` at an end lets a word go on.

    Scripts without spaces between words have no whole words: there any occurrence counts. A loose
    pattern takes all but ASCII letters for an edge, in a hundredth of the automaton: a value's last
    digit is one to what stands right behind it.
    """
    inside = "A-Za-z" if loose else r"\pL\pN"
    groups: dict[tuple[str, str], list[str]] = {}
    for word in words:
        body = word.strip("*")
        before = "" if word.startswith("*") else _edge(body[0], "^", inside)
        after = "" if word.endswith("*") else _edge(body[-1], "$", inside)
        groups.setdefault((before, after), []).append(re.escape(body))
    parts = (f"{b}(?:{'|'.join(bodies)}){a}" for (b, a), bodies in groups.items())
    return f"(?i){'|'.join(parts)}"


def _edge(letter: str, anchor: str, inside: str) -> str:
    return f"(?:{anchor}|[^{inside}])" if _in_word(letter) else ""


class _Compiled:
    """A rule with its patterns, compiled when the rule's pattern first matches."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.needed = needs(rule.pattern)
        self.only_near = rule.context if not rule.alone else ()
        """Words without which the rule finds nothing."""
        self.run = _RUNS.get(rule.edge)

    @cached_property
    def pattern(self) -> Pattern:
        return Pattern(self.rule.pattern)

    @cached_property
    def context(self) -> Pattern | None:
        return Pattern(words_pattern(self.rule.context)) if self.rule.context else None

    @cached_property
    def deny(self) -> Pattern | None:
        return Pattern(words_pattern(self.rule.deny)) if self.rule.deny else None


class _Pass(NamedTuple):
    """Rules tried together on texts that offer what they need."""

    needed: frozenset[str]
    indices: Sequence[int]
    patterns: PatternSet


class RuleRecogniser:
    """Finds what a list of rules describes."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._compiled = [_Compiled(rule) for rule in rules]
        digest = hashlib.sha256("".join(map(repr, self.rules)).encode())
        self.version = digest.hexdigest()[:12]
        """What tells these rules from others."""
        groups: dict[frozenset[str], list[int]] = {}
        for index, compiled in enumerate(self._compiled):
            scripts = compiled.needed - {DIGIT}
            groups.setdefault(scripts or compiled.needed, []).append(index)
        self._passes = [self._pass(*part) for group in groups.items() for part in _parts(*group)]
        near = dict.fromkeys(c.only_near for c in self._compiled if c.only_near)
        places = {words: place for place, words in enumerate(near)}
        self._near = [places.get(compiled.only_near) for compiled in self._compiled]
        """Of each rule, which of the contexts it needs."""
        self._contexts = PatternSet([words_pattern(words, loose=True) for words in near])

    def _pass(self, needed: frozenset[str], indices: Sequence[int]) -> _Pass:
        loose = [loosened(self.rules[index].pattern) for index in indices]
        return _Pass(needed, indices, PatternSet(loose))

    def spans(self, text: str) -> list[Span]:
        """Return what the rules find; rules may overlap."""
        return [span for _, span in self.explained(text)]

    def explained(self, text: str) -> list[tuple[Rule, Span]]:
        """Return each span with the rule that found it."""
        data = text.encode()
        return [
            (compiled.rule, span)
            for compiled in self._candidates(data)
            for span in _find(compiled, text, data)
        ]

    def _candidates(self, data: bytes) -> list[_Compiled]:
        """Return the rules that may find something, in their order."""
        shaped = shape(data)
        offered = offers(shaped)
        indices: list[int] = []
        for needed, members, patterns in self._passes:
            if needed <= offered:
                indices += [members[index] for index in patterns.matching(shaped)]
        if any(self._near[index] is not None for index in indices):
            met = {None, *self._contexts.matching(data)}
            indices = [index for index in indices if self._near[index] in met]
        indices.sort()
        return [self._compiled[index] for index in indices]


def _parts(
    needed: frozenset[str], indices: Sequence[int]
) -> Iterator[tuple[frozenset[str], Sequence[int]]]:
    """Yield rules that need the same, at most `TOGETHER` at once."""
    count = ceil(len(indices) / TOGETHER)
    for part in range(count):
        yield needed, indices[len(indices) * part // count : len(indices) * (part + 1) // count]


def _find(compiled: _Compiled, text: str, data: bytes) -> Iterator[Span]:
    rule, pattern = compiled.rule, compiled.pattern
    ascii_only = len(text) == len(data)
    hit = pattern.search(data)
    while hit is not None:
        start, end = hit.value if ascii_only else _characters(data, hit)
        score = _score(compiled, text, start, end)
        if score > 0:
            yield Span(start, end, rule.kind, rule.category, score, "rule")
        hit = pattern.search(data, _onward(compiled, data, hit, found=score > 0))


def _onward(compiled: _Compiled, data: bytes, hit: Hit, *, found: bool) -> int:
    """Return where to search on: behind a value that was found, else where another may begin.

    A value that is its whole match and begins within a word or a number is none, so what failed is
    not tried again from inside its first one.
    """
    after = hit.start + 1
    if found:
        return max(hit.value[1], after)
    if compiled.run is None or compiled.pattern.groups:
        return after
    run = compiled.run.match(data, hit.start)
    return max(run.end(), after) if run else after


def _characters(data: bytes, hit: Hit) -> tuple[int, int]:
    start = len(data[: hit.value[0]].decode())
    return start, start + len(data[slice(*hit.value)].decode())


def _score(compiled: _Compiled, text: str, start: int, end: int) -> float:
    """Return the score of a value, 0 where a condition does not hold."""
    rule, value = compiled.rule, text[start:end]
    if _touched(rule.edge, text, start, end):
        return 0.0
    score = rule.score
    if compiled.context is not None:
        near = f"{text[max(0, start - rule.reach) : start]}\n{text[end : end + rule.reach]}"
        if compiled.context.search(near.encode()) is None:
            score = rule.alone
    if score == 0:
        return 0.0
    if rule.check and not any(CHECKS[name](value) for name in rule.check):
        return 0.0
    if rule.entropy and entropy_bits(value) < rule.entropy:
        return 0.0
    if compiled.deny is not None:
        before = text[max(0, start - DENY_REACH) : start]
        if compiled.deny.search(before.encode()) is not None:
            return 0.0
    return score


def _touched(edge: str, text: str, start: int, end: int) -> bool:
    """Tell whether a letter or digit continues the value beyond its edges."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    first, last = text[start], text[end - 1]
    if edge == "word":
        return _joins(before[-1:], first) or _joins(last, after[:1])
    if edge == "none":
        return False
    if _both_digits(before[-1:], first) or _both_digits(last, after[:1]):
        return True
    return edge == "number" and (
        (before[-1:] in _WITHIN_NUMBERS and _both_digits(before[:1], first))
        or (after[:1] in _WITHIN_NUMBERS and _both_digits(last, after[1:]))
    )


def _both_digits(left: str, right: str) -> bool:
    return left.isdecimal() and right.isdecimal()


def _joins(left: str, right: str) -> bool:
    """Tell whether two neighbours belong to one word; scripts without spaces always part."""
    return _in_word(left) and _in_word(right)


def _in_word(letter: str) -> bool:
    if not letter:
        return False
    return letter.isdecimal() or unicodedata.category(letter) in {"Lu", "Ll", "Lt"}
