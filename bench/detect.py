"""What the detector finds, what it takes for private and is not, and what reading costs.

Unit: a passage of at most 512 characters, positive if it holds a span; flagged if the detector's
verdict is not clear: grey stays private. Recall is the mean over kinds. The held-out world was
written before anything was trained. Intervals are bootstrapped over passages; they say nothing
of wording and values that neither world has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bench import detect_text, harness
from bench.harness import RESAMPLES, Cell, Estimate, Figure, Goal, Options, Report, Row, estimate
from bench.public_prompts import DEMO_TOKENIZER, PROMPT_TOKENS, SEED, public_prompts
from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.context import ContextRules
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.scorer import LearnedScorer
from kvkeep.sharing.detector.spans import Span, Verdict
from tools.detector_data import heldout
from tools.detector_data.passages import KINDS, LANGUAGES, LIMIT, LOCALES

ROOT: Final = Path(__file__).resolve().parents[1]
FREE_TEXT: Final = frozenset(kind.kind for kind in KINDS.values() if kind.free_text)
WAYS: Final = ("rules", "scorer", "all")


class Sizes(NamedTuple):
    """How much to read."""

    positives: int
    """Passages of each kind and language."""
    negatives: int
    """Passages of each language."""
    real: int
    """Passages of real text of each language."""
    prompts: int
    timings: int


FULL: Final = Sizes(60, 400, 600, 36, 40)
QUICK: Final = Sizes(8, 60, 60, 6, 10)


@dataclass(frozen=True, slots=True)
class Judge:
    """The detector's parts, each read by itself, and what they say together."""

    rules: Detector
    scorer: Detector
    context: ContextRules

    @classmethod
    def shipped(cls) -> Judge:
        """Return what the package ships."""
        rules = RuleRecogniser(shipped_rules())
        return cls(Detector([rules]), Detector([LearnedScorer(rules)]), ContextRules())

    def read(self, text: str) -> dict[str, tuple[Span, ...]]:
        """Return the spans of each way of reading."""
        rules, scorer = self.rules.scan(text).spans, self.scorer.scan(text).spans
        both = (*rules, *scorer)
        return {"rules": rules, "scorer": scorer, "all": (*both, *self.context.combine(both))}


class Score(NamedTuple):
    """One passage's outcome: its kind (empty: nothing sensitive) and each way's best score."""

    kind: str
    best: Mapping[str, float]


def verdicts(spans: Iterable[Span]) -> float:
    """Return the largest score."""
    return max((span.score for span in spans), default=0.0)


def judge_all(judge: Judge, texts: Iterable[tuple[str, str]]) -> list[Score]:
    """Return the outcome of texts given with their kinds."""
    return [
        Score(kind, {way: verdicts(spans) for way, spans in judge.read(text).items()})
        for text, kind in texts
    ]


def flagged(score: float) -> bool:
    """Tell whether a score keeps a passage private."""
    return Span(0, 0, "", "", score, "").verdict is not Verdict.CLEAR


def tainted(score: float) -> bool:
    """Tell whether a score taints by itself."""
    return Span(0, 0, "", "", score, "").verdict is Verdict.TAINT


def macro(hits: Mapping[str, Sequence[bool]], *, seed: int = 0) -> Estimate:
    """Return the mean over kinds of their shares, with its interval."""
    rng = np.random.default_rng(seed)
    shares = [float(np.mean(one)) for one in hits.values()]
    drawn = [
        rng.binomial(len(one), share, RESAMPLES) / len(one)
        for one, share in zip(hits.values(), shares)
    ]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Estimate(float(np.mean(shares)), float(low), float(high), sum(map(len, hits.values())))


def by_kind(
    scores: Iterable[Score], way: str, kinds: frozenset[str], test: Callable[[float], bool]
) -> dict[str, list[bool]]:
    """Return, for each kind, which of its passages pass a test."""
    found: dict[str, list[bool]] = {}
    for score in scores:
        if score.kind in kinds:
            found.setdefault(score.kind, []).append(test(score.best[way]))
    return found


def share(scores: Iterable[Score], way: str, test: Callable[[float], bool]) -> Estimate:
    """Return the share of passages that pass a test."""
    return macro({"": [test(score.best[way]) for score in scores]})


def equal_false_positives(positive: Sequence[Score], negative: Sequence[Score]) -> Row:
    """Return free-text recall of rules, and of the scorer at no more false positives than rules."""
    budget = share(negative, "rules", flagged).median
    ordered = sorted((score.best["scorer"] for score in negative), reverse=True)
    allowed = int(budget * len(ordered))
    bound = max(0.3, ordered[allowed] + 1e-9 if allowed < len(ordered) else 0.0)
    rules = macro(by_kind(positive, "rules", FREE_TEXT, flagged)).median
    learned = macro(by_kind(positive, "scorer", FREE_TEXT, lambda s: s >= bound)).median
    return {
        "false_positives": budget,
        "scorer_bound": bound,
        "free_text_recall_rules": rules,
        "free_text_recall_scorer": learned,
    }


def heldout_rows(judge: Judge, sizes: Sizes) -> tuple[list[Figure], list[Row]]:
    """Return recall by language and the false positives of lookalikes."""
    world = heldout.world()
    figures: list[Figure] = []
    rows: list[Row] = []
    negatives: list[Score] = []
    positives: list[Score] = []
    kinds = frozenset(kind.kind for kind in KINDS.values())
    for lang in LANGUAGES:
        texts = [
            (passage.text, passage.target)
            for slot in KINDS
            for passage in world.positives(lang, slot, sizes.positives)
        ]
        scores = judge_all(judge, texts)
        plain = judge_all(judge, ((p.text, "") for p in world.negatives(lang, sizes.negatives)))
        recall = macro(by_kind(scores, "all", kinds, flagged))
        figures.append(Figure(f"detect_recall_{lang}", recall, Goal(">=", 0.97)))
        row: dict[str, Cell] = {"lang": lang}
        for way in WAYS:
            row[f"recall_{way}"] = macro(by_kind(scores, way, kinds, flagged)).median
            row[f"free_text_{way}"] = macro(by_kind(scores, way, FREE_TEXT, flagged)).median
            row[f"fpr_{way}"] = share(plain, way, flagged).median
        row["taint_recall_all"] = macro(by_kind(scores, "all", kinds, tainted)).median
        row["taint_fpr_all"] = share(plain, "all", tainted).median
        rows.append(row)
        rows += kind_rows(lang, scores)
        positives += scores
        negatives += plain
    figures.append(Figure("detect_fpr", share(negatives, "all", flagged), Goal("<=", 0.03)))
    equal = equal_false_positives(positives, negatives)
    gain = float(str(equal["free_text_recall_scorer"])) - float(
        str(equal["free_text_recall_rules"])
    )
    figures.append(
        Figure("detect_free_text_gain", Estimate(gain, gain, gain, len(positives)), Goal(">=", 0.1))
    )
    return figures, [*rows, equal]


def kind_rows(lang: str, scores: Sequence[Score]) -> list[Row]:
    """Return recall by kind."""
    kinds = dict.fromkeys(score.kind for score in scores)
    rows: list[Row] = []
    for kind in kinds:
        row: dict[str, Cell] = {"language": lang, "kind": kind}
        for way in WAYS:
            row[way] = macro(by_kind(scores, way, frozenset({kind}), flagged)).median
        rows.append(row)
    return rows


def real_rows(judge: Judge, sizes: Sizes) -> tuple[list[Figure], list[Row]]:
    """Return false positives on manual pages and docstrings."""
    rows: list[Row] = []
    manuals: list[Score] = []
    scores: list[Score] = []
    sources = [(f"manual pages, {lang}", lang) for lang in LOCALES]
    for name, lang in [*sources, ("Python's docstrings", "")]:
        texts = (
            detect_text.manual_passages(lang, sizes.real, SEED)
            if lang
            else detect_text.docstring_passages(sizes.real, SEED)
        )
        scores = judge_all(judge, ((text, "") for text in texts))
        if not scores:
            continue
        row: dict[str, Cell] = {"real_text": name, "passages": len(scores)}
        for way in WAYS:
            row[f"fpr_{way}"] = share(scores, way, flagged).median
        row["taint_fpr_all"] = share(scores, "all", tainted).median
        rows.append(row)
        if lang:
            manuals += scores
    docs = share(scores, "all", flagged)
    figures = [Figure("detect_fpr_python_docs", docs, Goal("<=", 0.03))]
    if manuals:
        pages = share(manuals, "all", flagged)
        figures.append(Figure("detect_fpr_manual_pages", pages, Goal("<=", 0.03)))
    return figures, rows


def clear_share(
    judge: Judge, text: str, tokenizer: Tokenizer, test: Callable[[float], bool]
) -> float:
    """Return the share of a prompt's tokens before its first span that passes a test."""
    spans = judge.read(text)["all"]
    first = min((span.start for span in spans if test(span.score)), default=len(text))
    return len(tokenizer.encode(text[:first], add_special_tokens=False).ids) / PROMPT_TOKENS


def prompt_rows(judge: Judge, sizes: Sizes) -> tuple[list[Figure], list[Row]]:
    """Return how much of public prompts comes before the first taint, and before the first grey.

    Grey is not promoted either, so the second is what a tenant's own scan lets others share.
    """
    tokenizer = Tokenizer.from_file(str(DEMO_TOKENIZER))
    clear, untainted = [], []
    for text in public_prompts(sizes.prompts):
        clear.append(min(1.0, clear_share(judge, text, tokenizer, flagged)))
        untainted.append(min(1.0, clear_share(judge, text, tokenizer, tainted)))
    row: Row = {
        "prompts": len(clear),
        "wholly_clear": float(np.mean(np.array(clear) >= 1.0)),
        "before_grey_share": _mean(clear).median,
        "before_taint_share": _mean(untainted).median,
    }
    figures = [
        Figure("detect_clear_prefix_share", _mean(untainted), Goal(">=", 0.95)),
        Figure("detect_clear_prefix_share_before_grey", _mean(clear)),
    ]
    return figures, [row]


def _mean(values: Sequence[float]) -> Estimate:
    """Return the mean and its interval: medians hide the prompts that fail."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[picks].mean(axis=1), [2.5, 97.5])
    return Estimate(float(np.mean(values)), float(low), float(high), len(values))


def time_rows(judge: Judge, sizes: Sizes) -> list[Figure]:
    """Return processor time per 512 characters, all languages alike."""
    world = heldout.world()
    texts = []
    for lang in LANGUAGES:
        joined = " ".join(p.text for p in world.negatives(lang, 40))
        texts += [joined[at : at + LIMIT] for at in range(0, 4 * LIMIT, LIMIT)]
    figures = []
    for name, detector, goal in (("rules", judge.rules, 0.05), ("all", load_detector(), 2.0)):
        for text in texts:
            detector.scan(text)
        samples = []
        for _ in range(sizes.timings):
            begun = time.process_time()
            for text in texts:
                detector.scan(text)
            samples.append((time.process_time() - begun) / len(texts) * 1e3)
        figures.append(
            Figure(f"detect_ms_per_512_chars_{name}", estimate(samples), Goal("<=", goal))
        )
    return figures


def measure(options: Options) -> Report:
    """Read everything once, then time it."""
    sizes = QUICK if options.quick else FULL
    judge = Judge.shipped()
    figures, rows = heldout_rows(judge, sizes)
    for part in (real_rows, prompt_rows):
        more, lines = part(judge, sizes)
        figures += more
        rows += lines
    figures += time_rows(judge, sizes)
    params: dict[str, Cell] = {"quick": options.quick, "prompt_tokens": PROMPT_TOKENS}
    params["scorer"] = LearnedScorer(RuleRecogniser(())).version
    return Report("detect", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("detect", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
