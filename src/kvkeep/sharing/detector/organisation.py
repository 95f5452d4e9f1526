"""An organisation's own rules: what else is private, what is not, and which categories matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.catalogue import RuleFile, check_keys, parse_rules
from kvkeep.sharing.detector.normalise import normalise
from kvkeep.sharing.detector.patterns import Pattern
from kvkeep.sharing.detector.rules import RuleRecogniser, words_pattern
from kvkeep.sharing.detector.spans import CATEGORIES, Span

_TABLES: Final = ("words", "allow", "rule", "categories", "lists")
_WORD_KEYS: Final = ("words", "kind", "category", "score")
_ALLOW_KEYS: Final = ("words", "patterns", "kinds")
_RULE_DEFAULTS: Final = {
    "kind": "organisation",
    "category": "identifier",
    "source": "the organisation",
}


class _Words(NamedTuple):
    pattern: Pattern
    kind: str
    category: str
    score: float


class _Allowed(NamedTuple):
    words: frozenset[str]
    patterns: tuple[Pattern, ...]
    kinds: frozenset[str]

    def covers(self, span: Span, value: str) -> bool:
        """Tell whether a span is harmless; credentials only where their kind is named."""
        if span.kind not in self.kinds and (self.kinds or span.category == "credential"):
            return False
        data = value.encode()
        whole = ((p.search(data), len(data)) for p in self.patterns)
        return value.casefold() in self.words or any(
            hit is not None and (hit.start, hit.end) == (0, length) for hit, length in whole
        )


@dataclass(frozen=True)
class Organisation:
    """The content of one file; `judge` applies it."""

    categories: frozenset[str]
    words: tuple[_Words, ...]
    allowed: tuple[_Allowed, ...]
    rules: RuleRecogniser | None
    version: str
    """Digest of the file's content."""

    def judge(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Return the spans that matter to the organisation and those of its own rules."""
        own = [span._replace(source="organisation") for span in self._own(text)]
        counted = [span for span in (*spans, *own) if span.category in self.categories]
        harmless = [
            span
            for span in counted
            if any(a.covers(span, text[span.start : span.end]) for a in self.allowed)
        ]
        return [span for span in counted if not any(_within(span, other) for other in harmless)]

    def _own(self, text: str) -> Iterable[Span]:
        if self.rules is not None:
            yield from self.rules.spans(text)
        data = text.encode() if self.words else b""
        for words in self.words:
            for hit in words.pattern.hits(data):
                start = len(data[: hit.start].decode())
                end = start + len(data[hit.start : hit.end].decode())
                yield Span(start, end, words.kind, words.category, words.score, "organisation")


def _within(span: Span, harmless: Span) -> bool:
    """Tell whether a span is an allowed one or a part of it; a credential never is a part."""
    if span.category == "credential" and span != harmless:
        return False
    return harmless.start <= span.start and span.end <= harmless.end


def parse_organisation(name: str, text: str) -> Organisation:
    """Return the rules in a TOML text; a ConfigError names file, line and reason."""
    document = RuleFile(name, text)
    check_keys(document, document.values, _TABLES)
    rules = parse_rules(document, _RULE_DEFAULTS)
    return Organisation(
        categories=_categories(document),
        words=tuple(_words(document)),
        allowed=tuple(_allowed(document)),
        rules=RuleRecogniser(rules) if rules else None,
        version=hashlib.sha256(text.encode()).hexdigest()[:12],
    )


def _categories(document: RuleFile) -> frozenset[str]:
    """Return the categories that count; one left out of the file counts."""
    given = document.values.get("categories", {})
    if not isinstance(given, dict):
        raise document.refuse(
            "categories: must be a table of names and true or false", "categories"
        )
    check_keys(document, given, sorted(CATEGORIES), "categories")
    for name, value in given.items():
        if not isinstance(value, bool):
            raise document.refuse(f"{name}: must be true or false", name, "categories")
    return frozenset(name for name in CATEGORIES if given.get(name, True))


def _words(document: RuleFile) -> Iterable[_Words]:
    for index, given in enumerate(_tables(document, "words")):
        check_keys(document, given, _WORD_KEYS, "words", index)
        words = _strings(document, given, "words", "words", index)
        if not words:
            raise document.refuse("words: name at least one word", "words", "words", index)
        category, score = given.get("category", "identifier"), given.get("score", 1.0)
        if not isinstance(category, str) or category not in CATEGORIES:
            reason = f"category: one of {', '.join(sorted(CATEGORIES))}"
            raise document.refuse(reason, "category", "words", index)
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise document.refuse("score: must lie between 0 and 1", "score", "words", index)
        plain = [normalise(word).text for word in words]
        yield _Words(
            Pattern(words_pattern(plain)), str(given.get("kind", "organisation")), category, score
        )


def _allowed(document: RuleFile) -> Iterable[_Allowed]:
    for index, given in enumerate(_tables(document, "allow")):
        check_keys(document, given, _ALLOW_KEYS, "allow", index)
        words = _strings(document, given, "words", "allow", index)
        patterns = []
        for text in _strings(document, given, "patterns", "allow", index):
            try:
                patterns.append(Pattern(text))
            except ConfigError as error:
                raise document.refuse(f"patterns: {error}", "patterns", "allow", index) from None
        kinds = frozenset(_strings(document, given, "kinds", "allow", index))
        plain = frozenset(normalise(word).text.casefold() for word in words)
        yield _Allowed(plain, tuple(patterns), kinds)


def _tables(document: RuleFile, name: str) -> list[dict[str, object]]:
    tables = document.values.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise document.refuse(f"{name}: write it as [[{name}]]", name)
    return tables


def _strings(
    document: RuleFile, given: dict[str, object], key: str, table: str, index: int
) -> list[str]:
    value = given.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip("*") for v in value):
        raise document.refuse(f"{key}: must be a list of words", key, table, index)
    return value


class OrganisationFile:
    """Rules of a file that may change while the detector runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._rules = self._read()
        self.problem: str | None = None
        """Why the file's newest content was not taken."""

    @property
    def version(self) -> str:
        """Return what tells the rules in force from others."""
        return self._rules.version

    def judge(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Return what the rules in force make of the spans."""
        return self._rules.judge(text, spans)

    def reload(self) -> bool:
        """Take the file's new content if it changed and is sound; otherwise keep the old rules."""
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            self._seen = stamp
            self._rules = self._read()
        except ConfigError as error:
            self.problem = str(error)
            return False
        self.problem = None
        return True

    def _stamp(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read ({error.strerror})") from None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> Organisation:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path}: cannot be read ({error})") from None
        return parse_organisation(str(self._path), text)
