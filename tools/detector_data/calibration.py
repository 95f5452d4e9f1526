"""From a scorer's odds to scores: slopes, bounds on the validation split, the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.sharing.detector.spans import CLEAR_BELOW, TAINT_ABOVE

PRIOR: Final = 0.1
"""Share of passages that hold something sensitive, which the plot is weighted to."""
KIND_PRIOR: Final = 0.03
"""Share that holds one given kind, for the slope of its scores."""
NEVER: Final = -30.0
"""The offset of a kind that never scores."""
BUDGET: Final = 0.012
PROSE_BUDGET: Final = 0.008
PROMPT_BUDGET: Final = 0.01
"""Share of lookalikes, of real prose and of public prompts' parts that may be flagged wrongly
beside what the rules flag."""
QUANTILES: Final = (
    *(0.0, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03),
    *(0.04, 0.06, 0.08, 0.1, 0.15, 0.2),
)
"""Shares of insensitive passages above a kind's possible bounds."""
BINS: Final = 10

Array = npt.NDArray[np.float64]


class Judged(NamedTuple):
    """A passage's largest log odds of each kind, and the kinds it holds."""

    odds: tuple[float, ...]
    kinds: frozenset[str]
    prose: bool = False
    """Real text, not a lookalike."""
    known: bool = False
    """Flagged by the rules already."""
    prompt: bool = False
    """A part of a public prompt."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Score = the largest over kinds of logistic(slope * log odds + offset)."""

    slopes: list[float]
    offsets: list[float]

    def scores(self, found: Sequence[Judged]) -> Array:
        """Return each passage's calibrated score."""
        odds = np.array([one.odds for one in found])
        inputs = odds * np.array(self.slopes) + np.array(self.offsets)
        scores: Array = (1 / (1 + np.exp(-np.clip(inputs, -30, 30)))).max(axis=1)
        return scores

    def report(self, found: Sequence[Judged]) -> str:
        """Return rates on the validation split, in words."""
        scores, truth = self.scores(found), sensitive(found)
        lines = []
        for name, bound in (("not clear", CLEAR_BELOW), ("taint", TAINT_ABOVE)):
            recall, false = (scores[truth] >= bound).mean(), (scores[~truth] >= bound).mean()
            lines.append(f"{name}: recall {recall:.4f}, false positives {false:.4f}")
        return "\n".join(lines)


def sensitive(found: Sequence[Judged]) -> npt.NDArray[np.bool_]:
    """Return which passages hold anything sensitive."""
    return np.array([bool(one.kinds) for one in found])


def weights_of(truth: npt.NDArray[np.bool_], prior: float) -> Array:
    """Return each passage's weight so that `prior` of the whole is true."""
    share = truth.mean()
    weights: Array = np.where(truth, prior / share, (1 - prior) / (1 - share))
    return weights


def platt(odds: Array, truth: npt.NDArray[np.bool_], prior: float) -> tuple[float, float]:
    """Return slope and offset of the logistic fit, by Newton's method, weighted to `prior`."""
    weights = weights_of(truth, prior)
    inputs = np.stack([odds, np.ones_like(odds)], axis=1)
    start = point = np.array([0.5, 0.0])
    for _ in range(100):
        scores = 1 / (1 + np.exp(-np.clip(inputs @ point, -30, 30)))
        gradient = inputs.T @ (weights * (scores - truth)) + 1e-2 * (point - start)
        curve = weights * scores * (1 - scores)
        hessian = (inputs * curve[:, None]).T @ inputs + 1e-2 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        point = point - step * min(1.0, 2.0 / float(np.abs(step).max() + 1e-9))
        if float(np.abs(step).max()) < 1e-6:
            break
    return float(max(point[0], 0.05)), float(point[1])


class _Falses(NamedTuple):
    """What a choice of bounds flags wrongly, as shares of what is allowed."""

    lookalikes: float
    prose: float
    prompts: float


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The search for each kind's bound: from none flagged wrongly to as much as is allowed."""

    odds: Array
    """`[passages, kinds]` of those that hold nothing."""
    prose: npt.NDArray[np.bool_]
    prompts: npt.NDArray[np.bool_]
    held: Sequence[Array]
    """The odds of each kind of passages that hold it and that the rules miss."""
    levels: Array
    """`[LEVELS, kinds]`: ever lower bounds."""

    def falses(self, chosen: Sequence[int]) -> _Falses:
        """Return the wrongly flagged shares of each sort of text, over their budgets."""
        bounds = np.array([self.levels[level, kind] for kind, level in enumerate(chosen)])
        hit: npt.NDArray[np.bool_] = np.asarray((self.odds > bounds).any(axis=1), np.bool_)
        lookalikes = ~self.prose & ~self.prompts
        return _Falses(
            *(
                float(hit[sort].sum()) / max(1, int(sort.sum())) / budget
                for sort, budget in (
                    (lookalikes, BUDGET),
                    (self.prose, PROSE_BUDGET),
                    (self.prompts, PROMPT_BUDGET),
                )
            )
        )

    def recall(self, kind: int, level: int) -> float:
        """Return how many of a kind's passages are above its bound; 1: the most missed kind's."""
        held = self.held[kind]
        return float((held > self.levels[level, kind]).sum()) / max(1, *map(len, self.held))

    def search(self) -> Array:
        """Return bounds: again and again the step that finds most for what it flags wrongly."""
        chosen = [0] * len(self.held)
        while True:
            now, best, rate = sum(self.falses(chosen)), None, 0.0
            for kind, level in enumerate(chosen):
                for ahead in range(level + 1, min(level + 5, len(self.levels))):
                    tried = [*chosen[:kind], ahead, *chosen[kind + 1 :]]
                    falses = self.falses(tried)
                    gain = self.recall(kind, ahead) - self.recall(kind, level)
                    if max(falses) <= 1 and gain / (sum(falses) - now + 1e-3) > rate:
                        best, rate = tried, gain / (sum(falses) - now + 1e-3)
            if best is None:
                return np.array([self.levels[level, kind] for kind, level in enumerate(chosen)])
            chosen = best


def calibrate(found: Sequence[Judged], kinds: Sequence[str], silent: frozenset[str]) -> Fit:
    """Return a fit of each kind: the slope by Platt, the clear bound by the budget.

    A score of `CLEAR_BELOW` stands at the bound; all kinds together flag wrongly no more than
    `BUDGET` of lookalikes, `PROSE_BUDGET` of prose and `PROMPT_BUDGET` of prompts' parts. Silent
    kinds never score: rules own them.
    """
    spoken = [place for place, kind in enumerate(kinds) if kind not in silent]
    fit = Fit([0.0] * len(kinds), [NEVER] * len(kinds))
    odds = np.array([one.odds for one in found])[:, spoken]
    none = ~sensitive(found)
    missed = ~np.array([one.known for one in found])
    fresh = none & missed
    holds = [np.array([kinds[place] in one.kinds for one in found]) for place in spoken]
    search = _Bounds(
        odds[fresh],
        np.array([one.prose for one in found])[fresh],
        np.array([one.prompt for one in found])[fresh],
        [odds[held & missed, place] for place, held in enumerate(holds)],
        np.quantile(odds[fresh], 1 - np.array(QUANTILES), axis=0),
    )
    start = math.log(CLEAR_BELOW / (1 - CLEAR_BELOW))
    bounds = search.search().tolist()
    for column, (place, held, bound) in enumerate(zip(spoken, holds, bounds)):
        chosen = held | none
        slope, _ = platt(odds[chosen, column], held[chosen], KIND_PRIOR)
        fit.slopes[place], fit.offsets[place] = slope, start - slope * bound
    return fit


def reliability(found: Sequence[Judged], fit: Fit) -> list[tuple[float, float, float]]:
    """Return mean score, share sensitive and weight of each bin that holds passages."""
    scores, truth = fit.scores(found), sensitive(found)
    weights = weights_of(truth, PRIOR)
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    rows = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            total = weights[inside].sum()
            mean = float((weights * scores)[inside].sum() / total)
            rows.append((mean, float(weights[inside & truth].sum() / total), float(total)))
    return rows


def plot(found: Sequence[Judged], fit: Fit, path: Path) -> None:
    """Draw the reliability plot."""
    import matplotlib as mpl  # noqa: PLC0415 - only this function draws

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvkeep"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = reliability(found, fit)
    figure, axis = plt.subplots(figsize=(5, 5))
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axis.plot([row[0] for row in rows], [row[1] for row in rows], marker="o", color="C0")
    for bound in (CLEAR_BELOW, TAINT_ABOVE):
        axis.axvline(bound, color="0.5", linestyle=":", linewidth=1)
    axis.set_xlabel("score")
    axis.set_ylabel("share of passages that hold something sensitive")
    axis.set_title(f"Validation split, {len(found)} passages, prior {PRIOR:.0%}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
