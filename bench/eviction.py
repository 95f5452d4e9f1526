"""What forgetting tokens costs: questions after a context was compressed, and before.

The suite and its seeds are committed, and so is what was chosen on other seeds: CORM's rows, c and
spread, and of every baseline the variant that loses least (`bench.eviction_choose`). Where a
baseline's published setting is another one, it stands beside. A baseline keeps the share that CORM
kept of the same prompt. All decide once, at the prompt's end, by masks in plain torch: so an equal
share is an equal footprint, and what a mask would free is counted. What engine and kernels make of
it is measured elsewhere.
`--only` names one protocol; `--model` takes the same parameters to another checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch

from bench import eviction_choose, eviction_suite, harness
from bench.eviction_choose import AGAIN, MOST_LOSS, OURS, REPEAT_RULES, RULES, Chosen
from bench.eviction_policies import ONCE, TWICE, Masks, at_share_of, corm, everything, paged
from bench.eviction_run import PROTOCOLS
from bench.eviction_tally import (
    Found,
    World,
    gathered,
    head_rows,
    kept_of,
    loss_of,
    margin,
    refuse_unable,
    removed_of,
    task_rows,
    worlds,
)
from bench.harness import Cell, Estimate, Figure, Goal, Options, Report, Row
from kvkeep import ops
from kvkeep.errors import ConfigError
from kvkeep.eviction.corm import PRESETS
from kvkeep.types import PAGE_TOKENS

LABELS: Final = {"after": ("agnostic", 0.70), "before": ("tuned", 0.75)}
PAGES: Final = "corm, whole pages"
TILES: Final = "corm, whole tiles"
PUBLISHED: Final = "published"


def measure(options: Options) -> Report:
    """Answer the held-out contexts under CORM and every baseline."""
    for name in options.only:
        if name not in PROTOCOLS:
            raise ConfigError(f"only: there is no protocol {name!r}; there are: {list(PROTOCOLS)}")
    torch.set_num_threads(options.threads)
    kernels = ops.select("auto", options.threads, "cpu")
    models = worlds(kernels, Path(options.model) if options.model else None)
    choices = eviction_choose.read()
    rows: list[Row] = []
    figures: list[Figure] = []
    margins: list[Estimate] = []
    contexts = 0
    for protocol in options.only or tuple(PROTOCOLS):
        chosen = choices[protocol]
        found, whole = answered(protocol, models, chosen, quick=options.quick)
        rows += [_row(protocol, name, chosen, found) for name in found]
        ours = chosen.ours
        rows += [*task_rows(protocol, ours, whole, found), *head_rows(protocol, ours, found)]
        figures += figures_of(protocol, ours, found)
        figures.append(Figure(f"loss_{LABELS[protocol][0]}_all_tasks", loss_of(whole, ours)))
        margins += _margins(protocol, chosen, found)
        contexts += sum(len(tally.heads) for tally in found[ours].values())
    worst = min(margins, key=lambda one: one.median)
    figures.append(Figure("loss_vs_best_baseline", worst, Goal(">=", 0.0)))
    params: dict[str, Cell] = {
        "model": options.model or f"demo and {len(models) - 1} recall models, toys",
        "prompts": contexts,
        "threads": options.threads,
        "quick": options.quick,
    }
    return Report("eviction", params, figures, rows)


def answered(
    protocol: str, models: Sequence[World], chosen: Chosen, *, quick: bool
) -> tuple[Found, Found]:
    """Answer the held-out contexts under all policies, baselines at both of our shares.

    Returns what tasks came to that are judged, and all tasks.
    """
    rule, repeat = RULES[protocol][chosen.rule], REPEAT_RULES[protocol][chosen.repeat]
    policies: dict[str, Masks] = {"full": everything, OURS: rule, AGAIN: repeat}
    for name, preset in PRESETS.items():
        own = partial(
            corm,
            window=preset.prompt_rows or preset.window,
            weight=preset.weight,
            recent=preset.recent,
            spread=preset.spread,
            most=preset.most,
        )
        policies[f"--evict {name}"] = own
    policies[PAGES] = partial(paged, rule, PAGE_TOKENS)
    policies[TILES] = partial(paged, rule, PAGE_TOKENS, by_head=True)
    for name, variants in {**ONCE, **TWICE}.items():
        tuned, published = chosen.variants[name], next(iter(variants))
        policies[name] = partial(at_share_of, variants[tuned], rule)
        if published != tuned:
            own = partial(at_share_of, variants[published], rule)
            policies[f"{name}, {PUBLISHED}"] = own
        if protocol == "after":
            policies[f"{name} beside {AGAIN}"] = partial(at_share_of, variants[tuned], repeat)
    seeds = eviction_suite.read().held_out[: 1 if quick else None]
    found = gathered(protocol, models, policies, seeds=seeds, quick=quick, twice=True)
    whole = refuse_unable(found, [world.name for world in models if world.gated])
    return found, whole


def _row(protocol: str, name: str, chosen: Chosen, found: Found) -> Row:
    loss, removed = loss_of(found, name), removed_of(found, name)
    base = name.partition(",")[0].partition(" beside")[0]
    setting = {OURS: chosen.rule, AGAIN: chosen.repeat, PAGES: chosen.rule, TILES: chosen.rule}.get(
        name, ""
    )
    if base in chosen.variants:
        variants = {**ONCE, **TWICE}[base]
        setting = next(iter(variants)) if PUBLISHED in name else chosen.variants[base]
    return {
        "question": protocol,
        "policy": name,
        "setting": setting,
        "kept_at_end": kept_of(found, name),
        "removed": removed.median,
        "removed_prompts_too": removed_of(found, name, prompts_too=True).median,
        "loss": loss.median,
        "low": loss.low,
        "high": loss.high,
    }


def figures_of(protocol: str, ours: str, found: Found) -> list[Figure]:
    """Return how much went and what that lost; what loses too much has removed nothing."""
    label, goal = LABELS[protocol]
    loss, removed = loss_of(found, ours), removed_of(found, ours)
    if loss.high > MOST_LOSS:
        removed = removed._replace(low=0.0)
    figures = [
        Figure(f"removed_at_1pct_loss_{label}", removed, Goal(">=", goal)),
        Figure(f"loss_{label}", loss, Goal("<=", MOST_LOSS)),
    ]
    if protocol == "before":
        figures.append(Figure("page_granular_removed", removed_of(found, PAGES), Goal("<=", 0.05)))
    return figures


def _margins(protocol: str, chosen: Chosen, found: Found) -> list[Estimate]:
    """Return by how much the best baseline loses more than ours, in three comparisons.

    At an equal share, which is an equal footprint, whatever it costs; and at an equal share and an
    equal cost of the prompt, read once or twice.
    """
    published = [name for name in found if PUBLISHED in name]
    beside = [f"{name} beside {AGAIN}" for name in (*ONCE, *TWICE)]
    rivals = [(OURS, [*ONCE, *published])]
    if chosen.ours == OURS:
        rivals.append((OURS, [*ONCE, *TWICE, *published]))
    if protocol == "after":
        rivals.append((AGAIN, beside))
    return [
        margin(found, ours, min(others, key=lambda name: loss_of(found, name).median))
        for ours, others in rivals
    ]


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("eviction", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
