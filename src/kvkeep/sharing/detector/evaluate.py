"""Measure a detector on labelled passages: recall by kind, false positives by passage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.spans import Verdict


class Label(NamedTuple):
    """Where something sensitive stands in a passage."""

    start: int
    end: int
    kind: str


class Case(NamedTuple):
    """A passage; without labels nothing in it is sensitive."""

    text: str
    labels: tuple[Label, ...]


class KindRecall(NamedTuple):
    """How many passages with a kind were found; a span must overlap the labelled one."""

    kind: str
    found: int
    passages: int

    @property
    def recall(self) -> float:
        """Return the found share."""
        return self.found / self.passages


class Evaluation(NamedTuple):
    """What came out; grey counts as found, because it stays private too."""

    kinds: tuple[KindRecall, ...]
    false_positives: int
    clean_passages: int

    @property
    def recall(self) -> float | None:
        """Return the mean over kinds; None without labels."""
        if not self.kinds:
            return None
        return sum(kind.recall for kind in self.kinds) / len(self.kinds)

    @property
    def false_positive_rate(self) -> float | None:
        """Return the share of clean passages that were not clear; None without clean ones."""
        return self.false_positives / self.clean_passages if self.clean_passages else None


def read_cases(path: Path) -> Iterator[Case]:
    """Yield the passages of a file: a line holds `text` and `spans` of `start`, `end`, `kind`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _case(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number}: give an object with `text` and `spans`, each with `start`, "
                    f"`end` and `kind` ({type(error).__name__}: {error})"
                ) from None


def _case(given: dict[str, Any]) -> Case:
    labels = tuple(
        Label(int(span["start"]), int(span["end"]), str(span["kind"]))
        for span in given.get("spans", [])
    )
    return Case(str(given["text"]), labels)


def evaluate(detector: Detector, cases: Iterable[Case]) -> Evaluation:
    """Return how a detector does on labelled passages."""
    found: Counter[str] = Counter()
    passages: Counter[str] = Counter()
    false_positives = clean = 0
    for case in cases:
        spans = [s for s in detector.scan(case.text).spans if s.verdict is not Verdict.CLEAR]
        clean += not case.labels
        false_positives += not case.labels and bool(spans)
        passages.update({label.kind for label in case.labels})
        found.update(
            {
                label.kind
                for label in case.labels
                if any(s.start < label.end and label.start < s.end for s in spans)
            }
        )
    kinds = tuple(KindRecall(kind, found[kind], passages[kind]) for kind in sorted(passages))
    return Evaluation(kinds, false_positives, clean)
