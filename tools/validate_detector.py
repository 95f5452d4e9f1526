"""Read the development world with the detector as it is: `python -m tools.validate_detector`.

What `kvkeep bench detect` tells of the held-out world, told of development's passages, of
real text of files that nothing is trained on and of development's public prompts, so that a change
can be chosen by it; or of validation's, on which the bounds are set. Recall is the mean over
kinds; text is flagged where the verdict is not clear.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer

from bench.detect import (
    WAYS,
    Judge,
    Score,
    by_kind,
    clear_share,
    flagged,
    judge_all,
    macro,
    share,
    tainted,
)
from bench.public_prompts import DEMO_TOKENIZER, public_prompts
from tools.detector_data import development, prose, validation
from tools.detector_data.passages import KINDS, LANGUAGES, World

WORLDS: Final = {"development": development, "validation": validation}
ALL_KINDS: Final = frozenset(kind.kind for kind in KINDS.values())


def told(judge: Judge, texts: Iterable[tuple[str, str]], *, misses: bool) -> list[Score]:
    """Return the outcome of texts given with their kinds; print those that are judged wrongly."""
    scores: list[Score] = []
    for text, kind in texts:
        scores += judge_all(judge, [(text, kind)])
        if misses and flagged(scores[-1].best["all"]) is not bool(kind):
            found = [(text[s.start : s.end], s.kind, s.source) for s in judge.read(text)["all"]]
            print(f"  [{kind or 'nothing'}] {text!r} {found}")
    return scores


def rates(name: str, scores: Sequence[Score]) -> str:
    """Return a line of what share of insensitive texts each way flags."""
    shares = " ".join(f"{way} {share(scores, way, flagged).median:.4f}" for way in WAYS)
    return f"{name:24} {len(scores):5} {shares} taint {share(scores, 'all', tainted).median:.4f}"


def world_lines(
    judge: Judge, world: World, positives: int, negatives: int, *, misses: bool
) -> list[str]:
    """Return recall and false positives by language."""
    lines: list[str] = []
    found: list[Score] = []
    plain: list[Score] = []
    for lang in LANGUAGES:
        texts = (
            (passage.text, passage.target)
            for slot in KINDS
            for passage in world.positives(lang, slot, positives)
        )
        scores = told(judge, texts, misses=misses)
        ways = (macro(by_kind(scores, way, ALL_KINDS, flagged)).median for way in WAYS)
        lines.append(f"recall {lang:17} {len(scores):5} " + " ".join(f"{way:.4f}" for way in ways))
        negative = ((passage.text, "") for passage in world.negatives(lang, negatives))
        judged = told(judge, negative, misses=misses)
        lines.append(rates(f"lookalikes {lang}", judged))
        found, plain = found + scores, plain + judged
    for kind, hits in by_kind(found, "all", ALL_KINDS, flagged).items():
        lines.append(f"kind {kind:19} {len(hits):5} {np.mean(hits):.4f}")
    return [*lines, rates("lookalikes", plain)]


def prose_lines(judge: Judge, texts_of: Mapping[str, Sequence[str]], *, misses: bool) -> list[str]:
    """Return false positives on real text that no weights were trained on, by language."""
    judged = {
        lang: told(judge, ((text, "") for text in texts), misses=misses)
        for lang, texts in texts_of.items()
    }
    lines = [rates(f"prose {lang}", scores) for lang, scores in judged.items() if scores]
    return [*lines, rates("prose", [score for scores in judged.values() for score in scores])]


def prompt_lines(judge: Judge, path: Path, count: int) -> list[str]:
    """Return the mean share of public prompts' tokens before the first taint and the first grey."""
    tokenizer = Tokenizer.from_file(str(DEMO_TOKENIZER))
    prompts = public_prompts(count, path)
    lines = []
    for name, test in (("taint", tainted), ("grey", flagged)):
        shares = [min(1.0, clear_share(judge, text, tokenizer, test)) for text in prompts]
        lines.append(f"prompts before {name:9} {count:5} {np.mean(shares):.4f}")
    return lines


def main() -> int:
    """Read everything and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=tuple(WORLDS), default="development")
    parser.add_argument("--positives", type=int, default=12, help="of each kind and language")
    parser.add_argument("--negatives", type=int, default=200, help="of each language")
    parser.add_argument("--prose", type=int, default=120, help="of each language and sort")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--misses", action="store_true", help="print what is judged wrongly")
    parser.add_argument("--locales", type=Path, default=Path("/usr/share/locale"))
    parser.add_argument("--manuals", type=Path, default=Path("/usr/share/man"))
    given = parser.parse_args()
    judge = Judge.shipped()
    sources = prose.Sources(given.locales, given.manuals, Path(np.__file__).parents[1])
    chosen = WORLDS[given.world]
    read = prose.read(sources, count=5 * given.prose)
    texts = read.choosing if given.world == "development" else read.unseen
    for lines in (
        world_lines(judge, chosen.world(), given.positives, given.negatives, misses=given.misses),
        prose_lines(judge, texts, misses=given.misses),
        prompt_lines(judge, chosen.PROMPTS, given.prompts),
    ):
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
