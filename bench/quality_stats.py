"""What a codec loses: shares of the model's own score, task by task, paired item by item.

An answer's task scores the mean over its items, text scores exp(-nats per token). A task's loss is
what is missing of the score with pages in the model's dtype; a codec's loss is the weighted mean
over tasks. Intervals are bootstrapped over contexts, the same for both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.harness import Cell, Estimate
from bench.quality_run import Item

RESAMPLES: Final = 2000
TEXT: Final = "text"

Array = NDArray[np.float64]


class Sums(NamedTuple):
    """A task's contexts: how many items each has, and their scores added up on both sides."""

    items: Array
    plain: Array
    coded: Array


class Changed(NamedTuple):
    """Items of a task that one side alone got right."""

    lost: int
    won: int


def by_task(plain: Sequence[Item], coded: Sequence[Item]) -> dict[str, Sums]:
    """Return each task's contexts; both sides hold the same items in the same order."""
    if [(a.task, a.context) for a in plain] != [(b.task, b.context) for b in coded]:
        raise ValueError("the two sides answered different items")
    found: dict[str, dict[int, list[float]]] = {}
    for a, b in zip(plain, coded, strict=True):
        sums = found.setdefault(a.task, {}).setdefault(a.context, [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, a.score, b.score)):
            sums[i] += value
    return {
        task: Sums(*np.array(list(contexts.values()), np.float64).T)
        for task, contexts in found.items()
    }


def loss(task: str, sums: Sums, picks: NDArray[np.int64]) -> Array:
    """Return a task's loss for each row of `picks`, contexts that count."""
    items, plain, coded = (side[picks].sum(-1) for side in sums)
    if task == TEXT:
        return np.asarray(1 - np.exp((plain - coded) / items))
    able = plain > 0  # who can't do a task loses nothing of it
    return np.where(able, 1 - coded / np.where(able, plain, 1.0), 0.0)


class Drawn(NamedTuple):
    """A loss, and what it is over resampled contexts; two of one suite are paired draw by draw."""

    point: float
    draws: Array


def drawn(
    plain: Sequence[Item], coded: Sequence[Item], weights: Mapping[str, float], *, seed: int = 0
) -> Drawn:
    """Return the weighted mean loss over all contexts, and over resampled ones."""
    rng, tasks = np.random.default_rng(seed), by_task(plain, coded)
    point, draws, total = 0.0, np.zeros(RESAMPLES), 0.0
    for task, sums in tasks.items():
        count, weight = len(sums.items), weights[task]
        point += weight * float(loss(task, sums, np.arange(count)[None])[0])
        draws += weight * loss(task, sums, rng.integers(0, count, (RESAMPLES, count)))
        total += weight
    return Drawn(point / total, draws / total)


def estimate(found: Drawn, items: int) -> Estimate:
    """Return a loss with its 95 % interval."""
    low, high = np.percentile(found.draws, [2.5, 97.5])
    return Estimate(found.point, float(low), float(high), items)


def overall(
    plain: Sequence[Item], coded: Sequence[Item], weights: Mapping[str, float], *, seed: int = 0
) -> Estimate:
    """Return the weighted mean loss and its 95 % interval."""
    return estimate(drawn(plain, coded, weights, seed=seed), len(plain))


def apart(one: Drawn, other: Drawn, items: int) -> Estimate:
    """Return by how much one loses more than another of the same items, draw by draw."""
    return estimate(Drawn(one.point - other.point, one.draws - other.draws), items)


def changed(plain: Sequence[Item], coded: Sequence[Item], task: str) -> Changed:
    """Return how many of a task's items became worse, and how many better."""
    pairs = [(a.score, b.score) for a, b in zip(plain, coded, strict=True) if a.task == task]
    return Changed(sum(b < a for a, b in pairs), sum(b > a for a, b in pairs))


def row(codec: str, task: str, plain: Sequence[Item], coded: Sequence[Item]) -> dict[str, Cell]:
    """Return a task's line in the report."""
    sums = by_task(plain, coded)[task]
    count = len(sums.items)
    found: dict[str, Cell] = {
        "codec": codec,
        "task": task,
        "items": int(sums.items.sum()),
        "bf16": float(sums.plain.sum() / sums.items.sum()),
        "coded": float(sums.coded.sum() / sums.items.sum()),
        "loss": float(loss(task, sums, np.arange(count)[None])[0]),
    }
    worse = changed(plain, coded, task)
    if task == TEXT:
        worse = Changed(worse.won, worse.lost)  # its score is a cost
    return found | {"worse": worse.lost, "better": worse.won}
