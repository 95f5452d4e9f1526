"""Which parameters are reported: chosen on development contexts, frozen in a committed file.

Of CORM's rules that keep what a goal leaves them, the one that keeps least among those whose loss
is at most half a hundredth by its upper bound, and where there is none, the one whose bound is
least; of a baseline's variants the one that loses least at the share that this rule keeps.
`python -m bench.eviction_choose [--quick] [--only after|before] [--parts N]` writes them; run it
again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

import msgspec
import torch

from bench import eviction_suite
from bench.eviction_parts import FOLDER, Enough, Learner, of_seed
from bench.eviction_policies import (
    ONCE,
    TWICE,
    Masks,
    Variants,
    at_share_of,
    corm,
    corm_repeat,
)
from bench.eviction_run import PROTOCOLS
from bench.eviction_tally import Found, kept_of, loss_of, removed_of, task_rows, worlds
from bench.harness import Estimate
from kvkeep import ops
from kvkeep.cli.console import NOTES

FILE: Final = Path(__file__).parent / "traces" / "eviction_chosen.json"
GRID: Final = {
    "before": (
        *((32, c, 16) for c in (128, 160, 192, 224, 256)),
        *((32, c, 20) for c in (160, 192, 256)),
        *((32, 128, 12), (32, 192, 12), (32, 192, 24), (64, 256, 16)),
    ),
    "after": ((64, 8, 16), (64, 16, 12), (64, 16, 16)),
}
"""Observed rows, weight, spread. No fewer rows: people ask longer questions than the suite."""
REPEAT_ROWS: Final = 16
"""Of the first reading, observed beside all of the second."""
REPEAT_GRID: Final = {
    "before": ((32, 0), (64, 0), (128, 0)),
    "after": (
        *((c, 0) for c in (64, 96, 128)),
        *((c, 1) for c in (96, 128, 192, 256)),
        *((c, 2) for c in (128, 192, 256, 384)),
        *((c, 4) for c in (256, 384)),
    ),
}
FIRST: Final = 1
"""Seeds on which all are tried."""
OPEN: Final = 3
"""Of the rules, how many are tried on more."""
SEEDS: Final = {"before": 14, "after": 6}
"""On which these are tried: late questions are many more to a context, and cost more."""
MOST_LOSS: Final = 0.01
SURE: Final = 0.005
"""What a rule's upper bound may be on development contexts."""
MOST_KEPT: Final = {"before": 0.25, "after": 0.3}
"""Of the footprint: a rule that keeps more comes after all that do not."""
OURS: Final = "corm"
AGAIN: Final = "corm+repeat"

RULES: Final[dict[str, dict[str, Masks]]] = {
    protocol: {
        f"rows={w} c={c} spread={s}": partial(corm, window=w, weight=c, spread=s)
        for w, c, s in grid
    }
    for protocol, grid in GRID.items()
}
REPEAT_RULES: Final[dict[str, dict[str, Masks]]] = {
    protocol: {
        f"repeat c={c} spread={s}": partial(corm_repeat, window=REPEAT_ROWS, weight=c, spread=s)
        for c, s in grid
    }
    for protocol, grid in REPEAT_GRID.items()
}


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What is reported under one protocol."""

    rule: str
    repeat: str
    ours: str
    """Which of both is reported: the rule, or the one that also reads the prompt again."""
    variants: dict[str, str]
    """Of each baseline, its variant at the share of what is reported."""


def read() -> dict[str, Chosen]:
    """Return the committed choices by protocol."""
    return msgspec.json.decode(FILE.read_bytes(), type=dict[str, Chosen])


class Tried(NamedTuple):
    """What a rule came to on development contexts."""

    kept: float
    removed: float
    loss: Estimate
    one: float
    """The upper bound of its loss on one seed's contexts, as many as are held out: a mean."""


def tried(found: Found, name: str, seeds: int) -> Tried:
    """Return what a rule came to on all contexts, and on as many as are held out."""
    highs = [loss_of(of_seed(found, number), name).high for number in range(seeds)]
    removed = removed_of(found, name).median
    return Tried(kept_of(found, name), removed, loss_of(found, name), fmean(highs))


def in_order(told: Mapping[str, Tried], most_kept: float) -> list[str]:
    """Return rules, the best first: of those that keep little, then of the others.

    Of both, those that surely lose little by what they keep, then the others by their bound.
    """

    def place(name: str) -> tuple[bool, bool, float]:
        one = told[name]
        sure = one.loss.high <= SURE
        return 1 - one.removed > most_kept, not sure, one.kept if sure else one.loss.high

    return sorted(told, key=place)


def choose(protocol: str, learner: Learner) -> Chosen:
    """Try all rules on the first seeds, the best on more, and baselines at what is kept."""
    rules = {**RULES[protocol], **REPEAT_RULES[protocol]}
    ordered = partial(in_order, most_kept=MOST_KEPT[protocol])
    told = _tried(protocol, "rules", learner, rules, FIRST)
    again = ordered({name: told[name] for name in REPEAT_RULES[protocol]})
    once = ordered({name: told[name] for name in RULES[protocol]})
    best = (again[:OPEN] if protocol == "after" else []) + once[:OPEN]
    told |= _tried(protocol, "best", learner, {name: rules[name] for name in best}, SEEDS[protocol])
    rule = ordered({name: told[name] for name in once[:OPEN]})[0]
    repeat = again[0]
    if protocol == "after":
        repeat = ordered({name: told[name] for name in again[:OPEN]})[0]
    both = {rule: OURS, repeat: AGAIN} if protocol == "after" else {rule: OURS}
    first = ordered({name: told[name] for name in both})[0]
    budget = {**dict.fromkeys(ONCE, rules[first]), **dict.fromkeys(TWICE, rules[repeat])}
    every: dict[str, Variants] = {**ONCE, **TWICE}
    tuned = {
        f"{name}: {variant}": partial(at_share_of, policy, budget[name])
        for name, own in every.items()
        for variant, policy in own.items()
    }
    lost = _tried(protocol, "baselines", learner, tuned, FIRST)
    variants = {
        name: min(own, key=lambda variant: lost[f"{name}: {variant}"].loss.median)
        for name, own in every.items()
    }
    return Chosen(rule=rule, repeat=repeat, ours=both[first], variants=variants)


def _tried(
    protocol: str, title: str, learner: Learner, policies: Mapping[str, Masks], first: int
) -> dict[str, Tried]:
    """Answer the contexts of so many first seeds, and say what came out."""
    seeds = learner.seeds[:first]
    twice = title != "best" or protocol == "after"
    found = learner.tried(protocol, title, policies, seeds, twice=twice)
    told = {name: tried(found, name, len(seeds)) for name in policies}
    NOTES.print(f"{protocol}, {title}: kept, removed, loss, low, high, high of one seed")
    for name, one in told.items():
        cells = (one.kept, one.removed, *one.loss[:3], one.one)
        NOTES.print(f"  {name:44}" + "".join(f"{cell:8.4f}" for cell in cells), highlight=False)
    for row in task_rows(protocol, "full", found):
        NOTES.print(f"  {row['task']}: {row['full']:.3f} of {row['items']}", highlight=False)
    return told


def main(arguments: Sequence[str]) -> int:
    """Choose and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=list(PROTOCOLS), action="append")
    parser.add_argument("--parts", type=int, help="stop after so many more (default: none)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    learner = Learner(
        worlds(ops.select("auto", given.threads, "cpu"), None),
        eviction_suite.read().development[: 1 if given.quick else None],
        quick=given.quick,
        folder=None if given.quick else FOLDER,
        parts=given.parts,
    )
    made = read() if given.out.exists() and given.out == FILE else {}
    for protocol in given.only or PROTOCOLS:
        try:
            made[protocol] = choose(protocol, learner)
        except Enough:
            NOTES.print("run it again to go on")
            return 3
        text = json.dumps(msgspec.to_builtins(made), indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
