"""The learned recogniser: a small tagger over hashed features, in numpy, weights in the package.

It reads what the rules found beside the text, and words that the rules would find with a reason
to, so that it learns which of them to trust.
Each token's features are rows of a table, added up; a window of tokens around it and a wider,
sparser one around that go through two layers to one number per kind. `tools/train_detector.py`
makes the weights; scores are calibrated there (Platt) on its own validation split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from kvkeep.errors import CheckpointError
from kvkeep.sharing.detector.checks import own_date
from kvkeep.sharing.detector.features import BITS, FEATURES, Lexicon, Tokens, tokenise
from kvkeep.sharing.detector.fillers import form_name, form_street, real_place, somebody
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.spans import CLEAR_BELOW, Span

VERSION: Final = 2
WINDOW: Final = 256
STRIDE: Final = 192
MARGIN: Final = (WINDOW - STRIDE) // 2
NEAR: Final = (-3, -2, -1, 0, 1, 2, 3)
WIDE: Final = (-8, -4, -2, -1, 0, 1, 2, 4, 8)
"""Reach of both layers together: 11 tokens, less than `MARGIN`."""
BRIDGE: Final = 2
"""Tokens below the threshold that a span may run over."""
WORDED: Final = frozenset({"health", "employer"})
"""Categories whose words the scorer is told of wherever they stand."""
WORD_SCORE: Final = 0.1
NO_ODDS: Final = -30.0


def _somewhere(value: str) -> bool:
    """Tell whether a span may be an address: no number alone, none of those that forms show."""
    return any(map(str.isalpha, value)) and real_place(value)


_SHOWN: Final = {"address": form_street, "person_name": form_name}
_NAMES: Final = frozenset({"person_name", "employer"})
_IN_DATES: Final = frozenset("0123456789./-")
_CHECKS: Final[Mapping[str, Callable[[str], bool]]] = {
    "person_name": somebody,
    "address": _somewhere,
    "date_of_birth": own_date,
}
BLOCK: Final = 7
"""Rows of a matrix product; BLOCK * 576 * 64 operations are few enough for one thread."""

Floats = npt.NDArray[np.float32]


class Window(NamedTuple):
    """Tokens to read, and which of them to keep the scores of."""

    start: int
    end: int
    keep_from: int
    keep_to: int


def windows(count: int) -> Iterator[Window]:
    """Yield windows of `WINDOW` tokens every `STRIDE`; what they keep covers each token once."""
    start = 0
    while True:
        end = min(start + WINDOW, count)
        last = end == count
        keep_from = start + MARGIN if start else 0
        yield Window(start, end, keep_from, count if last else end - MARGIN)
        if last:
            return
        start += STRIDE


def shifted(rows: Floats, offsets: tuple[int, ...]) -> Floats:
    """Return `[T, offsets * E]`: each row beside its neighbours, zeros beyond the edges."""
    count, width = rows.shape
    reach = max(offsets)
    padded = np.zeros((count + 2 * reach, width), np.float32)
    padded[reach : reach + count] = rows
    return np.concatenate([padded[reach + at : reach + at + count] for at in offsets], axis=1)


def product(rows: Floats, weights: Floats) -> Floats:
    """Return `rows @ weights`, in blocks so small that the BLAS stays on the calling thread.

    Its threads spin while they wait: on a busy machine they made this fifty times slower.
    """
    count, width = rows.shape
    blocks = -(-count // BLOCK)
    padded = np.zeros((blocks, BLOCK, width), np.float32)
    padded.reshape(-1, width)[:count] = rows
    found: Floats = (padded @ weights).reshape(blocks * BLOCK, -1)[:count]
    return found


@dataclass(frozen=True, slots=True)
class Weights:
    """A trained scorer."""

    kinds: tuple[tuple[str, str], ...]
    """Kind and category of each class but the first, which is "nothing"."""
    table: Floats
    """`[2 ** BITS, E]`, row 0 zero."""
    near: Floats
    near_bias: Floats
    wide: Floats
    wide_bias: Floats
    out: Floats
    out_bias: Floats
    slopes: Floats
    """`[kinds]`: score = logistic(slope * log odds + offset)."""
    offsets: Floats
    lexicon: Lexicon
    digest: str


def digest_of(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, object]) -> str:
    """Return the SHA-256 of arrays (names, dtypes, shapes, bytes) and what is told of them."""
    told = {name: value for name, value in meta.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def load_weights(path: Path | None = None) -> Weights:
    """Read weights, the package's own unless told otherwise.

    Raises CheckpointError for a file that is missing, altered or of another version.
    """
    chosen = path or Path(str(files("kvkeep.sharing.detector") / "scorer.npz"))
    try:
        with chosen.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        meta = json.loads(bytes(arrays.pop("meta")))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CheckpointError(
            f"scorer: {chosen.name} can't be read; install kvkeep anew"
        ) from error
    if meta["version"] != VERSION or meta["bits"] != BITS or meta["features"] != FEATURES:
        raise CheckpointError(
            f"scorer: {chosen.name} is of another version; train it with tools/train_detector.py"
        )
    if digest_of(arrays, meta) != meta["digest"]:
        raise CheckpointError(f"scorer: {chosen.name} was altered; install kvkeep anew")
    scale = arrays["table_scale"]
    return Weights(
        kinds=tuple((kind, category) for kind, category in meta["kinds"]),
        table=arrays["table"].astype(np.float32) * scale,
        **{
            name: arrays[name].astype(np.float32)
            for name in ("near", "near_bias", "wide", "wide_bias", "out", "out_bias")
        },
        slopes=np.array(meta["slopes"], np.float32),
        offsets=np.array(meta["offsets"], np.float32),
        lexicon=Lexicon(arrays["lexicon"]),
        digest=meta["digest"],
    )


class Hints:
    """What the scorer is told of a text: the rules' finds, and words alone of which rules ask more.

    An illness's name taints where a word near tells whose it is; here it counts anywhere.
    """

    def __init__(self, rules: RuleRecogniser) -> None:
        self.rules = rules
        self._words = RuleRecogniser(
            [
                replace(rule, context=(), score=WORD_SCORE)
                for rule in rules.rules
                if rule.context and not rule.alone and rule.category in WORDED
            ]
        )

    def of(self, text: str) -> list[Span]:
        """Return what the scorer is told of a text."""
        return self.beside(text, self.rules.spans(text))

    def beside(self, text: str, found: Sequence[Span]) -> list[Span]:
        """Return what the scorer is told of a text in which the rules found this."""
        return [*self._words.spans(text), *found]


class LearnedScorer:
    """Scores every token of a text and joins those that may be sensitive."""

    def __init__(self, rules: RuleRecogniser, weights: Weights | None = None) -> None:
        self.hints = Hints(rules)
        self._weights = weights or load_weights()

    @property
    def version(self) -> str:
        """Return what tells these weights from others."""
        return f"{VERSION}-{self._weights.digest[:12]}"

    def logits(self, tokens: Tokens) -> Floats:
        """Return `[T, 1 + kinds]`, window by window."""
        w = self._weights
        found = np.empty((len(tokens.starts), len(w.out_bias)), np.float32)
        if not len(found):
            return found
        # Feature by feature: rows of one feature beside each other add up four times as fast.
        rows = np.add.reduce(w.table.take(tokens.features.T, axis=0), axis=0)
        for window in windows(len(rows)):
            part = rows[window.start : window.end]
            near = np.maximum(product(shifted(part, NEAR), w.near) + w.near_bias, 0)
            wide = np.maximum(product(shifted(near, WIDE), w.wide) + w.wide_bias, 0)
            kept = slice(window.keep_from - window.start, window.keep_to - window.start)
            found[window.keep_from : window.keep_to] = product(wide, w.out)[kept] + w.out_bias
        return found

    def odds(self, tokens: Tokens) -> Floats:
        """Return `[T, kinds]`: the log odds of each kind over none, before calibration."""
        logits = self.logits(tokens)
        return logits[:, 1:] - logits[:, :1]

    def tokens(self, text: str, hints: Sequence[Span]) -> Tokens:
        """Return a text as the scorer reads it, with what the rules found."""
        return tokenise(text, self._weights.lexicon, hints)

    def without_fillers(self, text: str, tokens: Tokens, odds: Floats) -> Floats:
        """Return odds `[T, kinds]` without those of what forms show: no bound is set by them."""
        for column, (kind, category) in enumerate(self._weights.kinds):
            for first, last in runs(odds[:, column], 0.0) if kind in _CHECKS else ():
                start, end = int(tokens.starts[first]), int(tokens.ends[last])
                if not _counts(Span(start, end, kind, category, 1.0, "scorer"), text):
                    odds[first : last + 1, column] = NO_ODDS
        return odds

    def spans(self, text: str) -> list[Span]:
        """Return spans that are not clear; the rules are asked first, their spans kept back."""
        return self.read(text, self.hints.of(text))

    def read(self, text: str, hints: Sequence[Span]) -> list[Span]:
        """Return spans that are not clear, given what the rules found."""
        tokens = self.tokens(text, hints)
        if not len(tokens.starts):
            return []
        w = self._weights
        scores = 1 / (1 + np.exp(-np.clip(w.slopes * self.odds(tokens) + w.offsets, -30, 30)))
        found = (self._span(tokens, scores, run) for run in runs(scores.max(axis=1)))
        return [span for span in found if _counts(span, text)]

    def _span(self, tokens: Tokens, scores: Floats, run: tuple[int, int]) -> Span:
        """Return the span of some tokens: its best score and that score's kind."""
        first, last = run
        inside = scores[first : last + 1]
        best = int(inside.argmax()) % inside.shape[1]
        kind, category = self._weights.kinds[best]
        start, end = int(tokens.starts[first]), int(tokens.ends[last])
        return Span(start, end, kind, category, float(inside.max()), "scorer")


def _counts(span: Span, text: str) -> bool:
    """Tell whether a span is more than a form of address, an office or what forms show."""
    check = _CHECKS.get(span.kind)
    start, end = span.start, span.end
    if span.kind in _NAMES and end - start < 2:
        return False
    shown = _SHOWN.get(span.kind)
    if shown is not None and shown(text, start, end):
        return False
    if span.kind == "date_of_birth":  # a part of a date does not tell its day
        while start and text[start - 1] in _IN_DATES:
            start -= 1
        while end < len(text) and text[end] in _IN_DATES:
            end += 1
    return check is None or check(text[start:end])


def runs(scores: Floats, bound: float = CLEAR_BELOW) -> list[tuple[int, int]]:
    """Return first and last token of each run at or above a bound, small gaps bridged."""
    found: list[tuple[int, int]] = []
    for at in np.flatnonzero(scores >= bound).tolist():
        if found and at - found[-1][1] <= BRIDGE + 1:
            found[-1] = (found[-1][0], at)
        else:
            found.append((at, at))
    return found


class RulesAndScorer:
    """Rules and the scorer that reads what they find, each asked once."""

    def __init__(self, rules: RuleRecogniser, weights: Weights | None = None) -> None:
        self.rules = rules
        self._scorer = LearnedScorer(rules, weights)

    @property
    def version(self) -> str:
        """Return what tells both from others."""
        return f"{self.rules.version} {self._scorer.version}"

    def spans(self, text: str) -> list[Span]:
        """Return what either found."""
        found = self.rules.spans(text)
        return [*found, *self._scorer.read(text, self._scorer.hints.beside(text, found))]
