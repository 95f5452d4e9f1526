"""What forgetting tokens costs: questions after a context was compressed, and before.

Contexts are those of `bench/traces/quality.json` but its conversations and text; w and c are chosen
on contexts of other seeds, the cheapest that lose at most a hundredth there. Every baseline keeps
the share that CORM kept of the same prompt. One decision at the prompt's end, masks only, in plain
torch: what engine and kernels do with it is measured elsewhere. `--only` names one protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from bench import harness, quality_stats
from bench.eviction_policies import BASELINES, Policy, Seen, corm
from bench.eviction_run import Reader, after, before
from bench.harness import Cell, Estimate, Figure, Goal, Options, Report, Row
from bench.quality_run import Item
from bench.quality_suite import Context, Maker, read
from kvkeep import ops
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError
from kvkeep.models import loader
from kvkeep.models.text import TextModel

PROTOCOLS: Final = {"after": after, "before": before}
GOALS: Final = {"after": ("agnostic", 0.70), "before": ("tuned", 0.75)}
WINDOWS: Final = (64, 128, 256)
WEIGHTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0)
MOST_LOSS: Final = 0.01
KINDS: Final = ("facts", "table", "copy")
DEVELOPMENT: Final = 1
"""Added to the suite's seed."""

Masks = Callable[[Seen], Tensor]
Found = dict[str, tuple[list[float], list[Item]]]


def everything(seen: Seen) -> Tensor:
    """Keep all."""
    return torch.ones(seen.keys.shape[:3], dtype=torch.bool)


def at_share_of(policy: Policy, rule: Masks, seen: Seen) -> Tensor:
    """Keep by a policy as much as a rule does."""
    return policy(seen, float(rule(seen).float().mean()))


def gathered(
    protocol: str, reader: Reader, contexts: Sequence[Context], policies: dict[str, Masks]
) -> Found:
    """Return each policy's kept shares and items."""
    found: Found = {name: ([], []) for name in policies}
    for name, kept, items in PROTOCOLS[protocol](reader, contexts, policies):
        found[name][0].append(kept)
        found[name][1].extend(items)
    return found


def loss_of(found: Found, name: str) -> Estimate:
    """Return a policy's loss beside keeping all."""
    items = found["full"][1]
    return quality_stats.overall(items, found[name][1], {item.task: 1.0 for item in items})


def kept_of(found: Found, name: str) -> float:
    """Return the mean share that a policy kept."""
    return sum(found[name][0]) / len(found[name][0])


def chosen(found: Found, rules: dict[str, Masks]) -> str:
    """Return the rule that keeps least among those that lose at most a hundredth."""
    able = [name for name in rules if loss_of(found, name).median <= MOST_LOSS]
    return min(able or rules, key=lambda name: kept_of(found, name) * (1 if able else -1))


def measure(options: Options) -> Report:
    """Choose w and c, then answer the suite under CORM and every baseline."""
    for name in options.only:
        if name not in PROTOCOLS:
            raise ConfigError(f"only: there is no protocol {name!r}; there are: {list(PROTOCOLS)}")
    torch.set_num_threads(options.threads)
    path = Path(options.model or DEMO_MODEL)
    text = TextModel.load(path)
    kernels = ops.select("auto", options.threads, "cpu")
    model = loader.load(path, dtype="float32", ops=kernels)
    reader = Reader(model, text)
    asked, learnt = (
        [c for c in maker.contexts(quick=options.quick) if c.kind in KINDS]
        for maker in (
            Maker(read(), text, model.spec.vocab_size, reseed=seed) for seed in (0, DEVELOPMENT)
        )
    )
    if options.quick:
        asked, learnt = asked[::2], learnt[::3]
    rules: dict[str, Masks] = {
        f"corm w={w} c={c:g}": partial(corm, window=w, weight=c) for w in WINDOWS for c in WEIGHTS
    }
    rows: list[Row] = []
    figures: list[Figure] = []
    for protocol in options.only or tuple(PROTOCOLS):
        tried = gathered(protocol, reader, learnt, {"full": everything, **rules})
        rows += [_row(protocol, "development", name, tried) for name in rules]
        rule = chosen(tried, rules)
        NOTES.print(f"{protocol}: {rule}")
        others: dict[str, Masks] = {
            name: partial(at_share_of, policy, rules[rule]) for name, policy in BASELINES.items()
        }
        paper: dict[str, Masks] = {"corm-paper": partial(corm, window=256, weight=1.0)}
        policies = {"full": everything, rule: rules[rule], **paper, **others}
        found = gathered(protocol, reader, asked, policies)
        rows += [_row(protocol, "held out", name, found) for name in policies]
        figures += _figures(protocol, rule, found, list(others))
    params: dict[str, Cell] = {
        "model": options.model or "demo, a toy",
        "contexts": len(asked),
        "threads": options.threads,
        "quick": options.quick,
    }
    return Report("eviction", params, figures, rows)


def _row(protocol: str, seeds: str, name: str, found: Found) -> Row:
    loss = loss_of(found, name)
    return {
        "question": protocol,
        "seeds": seeds,
        "policy": name,
        "kept": kept_of(found, name),
        "loss": loss.median,
        "low": loss.low,
        "high": loss.high,
        "items": len(found[name][1]),
    }


def _figures(protocol: str, rule: str, found: Found, others: Sequence[str]) -> list[Figure]:
    """Return how much went, what that lost, and the best baseline's loss less ours."""
    label, goal = GOALS[protocol]
    removed = harness.estimate([1 - kept for kept in found[rule][0]])
    ours = loss_of(found, rule)
    best = min((loss_of(found, name) for name in others), key=lambda loss: loss.median)
    items = len(found[rule][1])
    margin = Estimate(best.median - ours.median, best.low - ours.high, best.high - ours.low, items)
    return [
        Figure(f"removed_at_end_{label}", removed, Goal(">=", goal)),
        Figure(f"loss_{label}", ours, Goal("<=", MOST_LOSS)),
        Figure(f"loss_vs_best_baseline_{label}", margin, Goal(">=", 0.0)),
    ]


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("eviction", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
