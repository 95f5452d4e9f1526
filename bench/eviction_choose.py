"""Which parameters are reported: chosen on development contexts, frozen in a committed file.

Of CORM's rules the one that keeps least among those whose loss is at most a hundredth on its face;
of a baseline's variants the one that loses least at the share that this rule keeps.
`python -m bench.eviction_choose [--quick] [--only after|before]` writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import torch

from bench.eviction_policies import (
    ONCE,
    TWICE,
    Masks,
    Variants,
    at_share_of,
    corm,
    corm_repeat,
    everything,
)
from bench.eviction_run import PROTOCOLS
from bench.eviction_tally import (
    Found,
    World,
    gathered,
    kept_of,
    loss_of,
    task_rows,
    worlds,
)
from kvkeep import ops
from kvkeep.cli.console import NOTES

FILE: Final = Path(__file__).parent / "traces" / "eviction_chosen.json"
GRID: Final = (
    *((w, c, s) for w in (32, 64) for c in (16, 32, 64, 128) for s in (0, 8, 12, 16, 24)),
    *((w, c, s) for w in (128, 256) for c in (1, 4, 16) for s in (0, 8, 16)),
)
"""Observed rows, weight, spread. No fewer rows: people ask longer questions than the suite."""
REPEAT_ROWS: Final = 16
"""Of the first reading, observed beside all of the second."""
REPEAT_GRID: Final = tuple((c, s) for c in (32, 64, 128, 192, 256, 384) for s in (0, 2, 4))
MOST_LOSS: Final = 0.01
OURS: Final = "corm"
AGAIN: Final = "corm+repeat"

RULES: Final[dict[str, Masks]] = {
    f"rows={w} c={c} spread={s}": partial(corm, window=w, weight=c, spread=s) for w, c, s in GRID
}
REPEAT_RULES: Final[dict[str, Masks]] = {
    f"repeat c={c} spread={s}": partial(corm_repeat, window=REPEAT_ROWS, weight=c, spread=s)
    for c, s in REPEAT_GRID
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


def cheapest(found: Found, rules: Mapping[str, Masks]) -> str:
    """Return the rule that keeps least among those that lose little; if none does, the mildest."""
    able = [name for name in rules if loss_of(found, name).median <= MOST_LOSS]
    if not able:
        return min(rules, key=lambda name: loss_of(found, name).median)
    return min(able, key=lambda name: kept_of(found, name))


def choose(protocol: str, models: Sequence[World], *, quick: bool) -> Chosen:
    """Try all rules on development contexts, then all variants at the chosen rules' shares."""
    rules = {**RULES, **REPEAT_RULES}
    found = _tried(protocol, models, rules, quick=quick, title="rules")
    rule, repeat = cheapest(found, RULES), cheapest(found, REPEAT_RULES)
    both = {rule: OURS, repeat: AGAIN} if protocol == "after" else {rule: OURS}
    ours = both[cheapest(found, {name: rules[name] for name in both})]
    variants: dict[str, str] = {}
    once = REPEAT_RULES[repeat] if ours == AGAIN else RULES[rule]
    budget = {**dict.fromkeys(ONCE, once), **dict.fromkeys(TWICE, REPEAT_RULES[repeat])}
    every: dict[str, Variants] = {**ONCE, **TWICE}
    tried: dict[str, Masks] = {
        f"{name}: {variant}": partial(at_share_of, policy, budget[name])
        for name, own in every.items()
        for variant, policy in own.items()
    }
    found = _tried(protocol, models, tried, quick=quick, title="baselines")
    for name, own in every.items():
        losses = {variant: loss_of(found, f"{name}: {variant}").median for variant in own}
        variants[name] = min(losses, key=lambda variant: losses[variant])
    return Chosen(rule=rule, repeat=repeat, ours=ours, variants=variants)


def _tried(
    protocol: str,
    models: Sequence[World],
    policies: Mapping[str, Masks],
    *,
    quick: bool,
    title: str,
) -> Found:
    """Answer the development contexts and say what came out."""
    found = gathered(
        protocol,
        models,
        {"full": everything, **policies},
        development=True,
        quick=quick,
        twice=True,
    )
    NOTES.print(f"{protocol}, {title}: kept, loss, upper bound")
    for name in policies:
        loss = loss_of(found, name)
        NOTES.print(
            f"  {name:44} {kept_of(found, name):.3f} {loss.median:7.4f} {loss.high:7.4f}",
            highlight=False,
        )
    for row in task_rows(protocol, "full", found):
        NOTES.print(f"  {row['task']}: {row['full']:.3f} of {row['items']}", highlight=False)
    return found


def main(arguments: Sequence[str]) -> int:
    """Choose and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=list(PROTOCOLS), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    models = worlds(ops.select("auto", given.threads, "cpu"), None)
    made = read() if given.out.exists() and given.out == FILE else {}
    for protocol in given.only or PROTOCOLS:
        made[protocol] = choose(protocol, models, quick=given.quick)
        text = json.dumps(msgspec.to_builtins(made), indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
