"""What policies kept and lost over models: every model weighs the same, and of a model each task.

Removed is one less the share of tokens that rows after prompts' ends attended to, of all before
them (a footprint); prompts themselves are computed whole, and with their rows it is given beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from bench import eviction_suite, quality_stats
from bench.eviction_policies import Masks
from bench.eviction_reader import Reader
from bench.eviction_run import EACH, PROTOCOLS, Outcome
from bench.eviction_suite import Suite
from bench.harness import Cell, Estimate
from bench.quality_run import Item
from bench.quality_suite import Context
from kvkeep.config import DEMO_MODEL
from kvkeep.models import loader
from kvkeep.models.checkpoint import open_checkpoint
from kvkeep.models.text import TextModel
from kvkeep.ops.layout import Ops

RECALL_MODELS: Final = tuple(sorted((Path(__file__).parent / "data").glob("recall-*")))
ABLE: Final = 0.98
"""Of a recall model's answers over all tokens, before any policy is judged on a task."""
RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class World:
    """A model and how its contexts are made."""

    name: str
    reader: Reader
    contexts: Callable[[int, bool], list[Context]]
    """Of (reseed, quick)."""
    gated: bool = False
    each: int | None = None
    """Questions of a task and context that are asked; None: all."""


def worlds(ops: Ops, path: Path | None, suite: Suite | None = None) -> list[World]:
    """Return the demo model's and the recall models', or those of a checkpoint.

    `suite`: None is the committed one.
    """
    suite = suite or eviction_suite.read()
    where = path or DEMO_MODEL
    text = TextModel.load(where)
    model = loader.load(where, dtype="float32", ops=ops)

    def told(reseed: int, quick: bool) -> list[Context]:
        return eviction_suite.of_text(
            suite, text, model.spec.vocab_size, reseed=reseed, quick=quick
        )

    def recalled(reseed: int, quick: bool) -> list[Context]:
        return eviction_suite.of_recall(suite, reseed=reseed, quick=quick)

    found = [
        World("given" if path else "demo", Reader(model, theta_of(where), text), told, each=EACH)
    ]
    if path is None:
        for own in RECALL_MODELS:
            made = loader.load(own, dtype="float32", ops=ops)
            found.append(World(own.name, Reader(made, theta_of(own)), recalled, gated=True))
    return found


def theta_of(path: Path) -> float:
    """Return the base of a checkpoint's rotary embedding; scaled ones are taken as they are."""
    config = open_checkpoint(path).config
    rope = config.get("rope_parameters") or config
    return float(rope.get("rope_theta", 10_000.0))


@dataclass(slots=True)
class Tally:
    """One policy's outcomes on one model."""

    items: list[Item] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    rows: list[tuple[float, float, float]] = field(default_factory=list)
    """(live, seen, of prompts) tokens per outcome."""

    def add(self, outcome: Outcome, world: str) -> None:
        """Count one outcome."""
        self.items += [Item(f"{world}/{i.task}", i.context, i.score) for i in outcome.items]
        self.heads.append(outcome.kept)
        self.rows.append((outcome.live_tokens, outcome.seen_tokens, outcome.prompt_tokens))


Found = dict[str, dict[str, Tally]]
"""By policy and model."""


def gathered(
    protocol: str,
    models: Sequence[World],
    policies: Mapping[str, Masks],
    *,
    seeds: Sequence[int],
    quick: bool,
    twice: bool,
) -> Found:
    """Answer some seeds' contexts under each policy; `policies` begin with `full`."""
    found: Found = {name: {} for name in policies}
    for world in models:
        contexts = [context for seed in seeds for context in world.contexts(seed, quick)]
        for outcome in PROTOCOLS[protocol](
            world.reader, contexts, policies, twice=twice, each=world.each
        ):
            found[outcome.policy].setdefault(world.name, Tally()).add(outcome, world.name)
    return found


def refuse_unable(found: Found, gated: Sequence[str], least: float = ABLE) -> Found:
    """Leave out, for all policies, tasks that a recall model can't do with all its tokens.

    Returns what all tasks came to, those included.
    """
    whole: Found = {
        policy: {name: replace(tally) for name, tally in tallies.items()}
        for policy, tallies in found.items()
    }
    for name in gated:
        full = found["full"].get(name, Tally()).items
        by_task: dict[str, list[float]] = {}
        for item in full:
            by_task.setdefault(item.task, []).append(item.score)
        able = {task for task, scores in by_task.items() if np.mean(scores) >= least}
        for tallies in found.values():
            if name in tallies:
                tallies[name].items = [i for i in tallies[name].items if i.task in able]
    return whole


def items_of(found: Found, policy: str) -> list[Item]:
    """Return all models' items."""
    return [item for tally in found[policy].values() for item in tally.items]


def weights_of(items: Sequence[Item]) -> dict[str, float]:
    """Return the weight of each task: models weigh the same, and of a model its tasks."""
    tasks = {item.task for item in items}
    of_model: dict[str, int] = {}
    for task in tasks:
        model = task.partition("/")[0]
        of_model[model] = of_model.get(model, 0) + 1
    return {task: 1 / of_model[task.partition("/")[0]] for task in tasks}


def drawn_loss(found: Found, policy: str) -> quality_stats.Drawn:
    """Return a policy's loss beside keeping all."""
    full = items_of(found, "full")
    return quality_stats.drawn(full, items_of(found, policy), weights_of(full))


def loss_of(found: Found, policy: str) -> Estimate:
    """Return the same with its interval."""
    return quality_stats.estimate(drawn_loss(found, policy), len(items_of(found, policy)))


def margin(found: Found, ours: str, other: str) -> Estimate:
    """Return how much more another policy loses, paired."""
    mine, theirs = drawn_loss(found, ours), drawn_loss(found, other)
    both = quality_stats.Drawn(theirs.point - mine.point, theirs.draws - mine.draws)
    return quality_stats.estimate(both, len(items_of(found, ours)))


def kept_of(found: Found, policy: str) -> float:
    """Return the mean share at prompts' ends."""
    shares = [torch.stack(tally.heads).mean() for tally in found[policy].values()]
    return float(torch.stack(shares).mean())


def removed_of(found: Found, policy: str, *, prompts_too: bool = False) -> Estimate:
    """Return the share of the footprint that is gone, and its interval over contexts."""
    rng = np.random.default_rng(0)
    draws, points, count = np.zeros(RESAMPLES), [], 0
    for tally in found[policy].values():
        live, seen, own = np.array(tally.rows).T
        both = np.stack([live, seen]) + (own if prompts_too else 0.0)
        picks = rng.integers(0, len(live), (RESAMPLES, len(live)))
        points.append(1 - both[0].sum() / both[1].sum())
        draws += 1 - both[0][picks].sum(1) / both[1][picks].sum(1)
        count += len(live)
    low, high = np.percentile(draws / len(points), [2.5, 97.5])
    return Estimate(float(np.mean(points)), float(low), float(high), count)


def head_rows(protocol: str, policy: str, found: Found) -> Iterator[dict[str, Cell]]:
    """Yield what each layer and head kept, a mean over contexts."""
    for model, tally in found[policy].items():
        mean = torch.stack(tally.heads).mean(0)
        for layer, heads in enumerate(mean.tolist()):
            for head, kept in enumerate(heads):
                yield {
                    "question": protocol,
                    "model": model,
                    "layer": layer,
                    "head": head,
                    "kept_by_head": kept,
                }


def task_rows(
    protocol: str, policy: str, found: Found, judged: Found | None = None
) -> Iterator[dict[str, Cell]]:
    """Yield what a policy loses of each task, and whether it is judged by that."""
    full, own = items_of(found, "full"), items_of(found, policy)
    counted = {item.task for item in items_of(found if judged is None else judged, policy)}
    for task in sorted({item.task for item in full}):
        mine = [item for item in own if item.task == task]
        plain = [item for item in full if item.task == task]
        loss = quality_stats.overall(plain, mine, {task: 1.0})
        yield {
            "question": protocol,
            "task": task,
            "judged": task in counted,
            "items": len(mine),
            "full": float(np.mean([item.score for item in plain])),
            "corm": float(np.mean([item.score for item in mine])),
            "task_loss": loss.median,
            "task_high": loss.high,
        }
