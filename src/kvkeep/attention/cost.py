"""What attending takes: t = c0 + n (a_mem fresh + a_row M) + a_merge M, in nanoseconds.

n tokens are read by M rows of one KV head; `fresh` is 1 where they come from memory. Fewer rows
than `MIN_ROWS` take as long as that many: tokens are read, if only from a cache. Source: the form
of CoDec's profiled cost; the terms are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvkeep.errors import ConfigError
from kvkeep.types import Layout

MIN_ROWS = 4
"""Measured: one row takes as long as three to four."""


def padded(rows: int) -> int:
    """Return the rows that are computed for `rows` of them."""
    return max(rows, MIN_ROWS)


class Sample(NamedTuple):
    """One measured item."""

    rows: int
    tokens: int
    fresh: bool
    ns: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of one layout, head_dim and machine."""

    c0: float
    a_mem: float
    """Per token: reading it from memory."""
    a_row: float
    """Per token and row."""
    a_merge: float = 0.0
    """Per row of a group that goes on from its parent: reading and writing a state once more."""

    def ns(self, rows: int, tokens: int, *, merges: bool = False) -> float:
        """Return what `rows` rows of one KV head over `tokens` tokens from memory take."""
        merge = self.a_merge * rows if merges else 0.0
        return self.c0 + tokens * (self.a_mem + self.a_row * padded(rows)) + merge


SEED = CostModel(c0=800.0, a_mem=12.0, a_row=1.5, a_merge=40.0)
"""Before anything is measured: head_dim 64 to 128 in bfloat16 on a server core."""

BELIEVED = 10
"""Times a seed's, or this part of it: what a measurement further off shows is something else."""

DEVICE_SEED = CostModel(c0=128.0, a_mem=1.0, a_row=0.005, a_merge=2.0)
"""For a GPU, in units of one token's reading: a launch costs 128, 200 rows as much as reading, a
part of a row 2. Derived from a data sheet's bandwidth and peak; taken where a device's kernels
can't be measured.
"""


def save(path: Path, models: Mapping[Layout, CostModel]) -> None:
    """Write the coefficients of each layout as JSON."""
    table = {layout.name.lower(): asdict(model) for layout, model in models.items()}
    path.write_text(json.dumps(table, indent=2) + "\n")


def load(path: Path, layouts: Sequence[Layout]) -> tuple[CostModel, ...]:
    """Read what `save` wrote of these layouts; raises `ConfigError`."""
    try:
        table = json.loads(path.read_text())
        found = {name: _model(coefficients) for name, coefficients in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"attention_cost_model: {path} holds no cost models ({error}); remove the setting to "
            "measure them at start"
        ) from error
    lacking = [layout.name.lower() for layout in layouts if layout.name.lower() not in found]
    if lacking:
        raise ConfigError(
            f"attention_cost_model: {path} has no costs of {lacking[0]} pages; add them, or remove "
            "the setting to measure them at start"
        )
    return tuple(found[layout.name.lower()] for layout in layouts)


def _model(coefficients: Mapping[str, float]) -> CostModel:
    """Return the model of these coefficients, all of them; raises `ValueError` or `TypeError`."""
    if set(coefficients) != set(asdict(SEED)):
        raise ValueError(f"a layout has {', '.join(asdict(SEED))}")
    model = CostModel(**{name: float(value) for name, value in coefficients.items()})
    if not all(np.isfinite(value) and value >= 0 for value in asdict(model).values()):
        raise ValueError("a coefficient is below 0 or not finite")
    return model


def fit(samples: Sequence[Sample]) -> CostModel:
    """Return the least-squares model of measured items by relative error; no term below 0."""
    weight = np.array([1.0 / sample.ns for sample in samples])
    columns = np.array([[1.0, s.tokens * s.fresh, s.tokens * padded(s.rows)] for s in samples])
    solved, *_ = np.linalg.lstsq(columns * weight[:, None], np.ones(len(samples)), rcond=None)
    c0, a_mem, a_row = (max(0.0, float(x)) for x in solved)
    return CostModel(c0, a_mem, a_row, SEED.a_merge)


def merge_cost(ns: float, error: float, seed: float = SEED.a_merge) -> float:
    """Return a_merge as measured where that is plausible and clear of noise, otherwise the seed's.

    A state of 64 to 128 numbers is read and written in a few nanoseconds from the nearest cache, in
    some hundred from memory.
    """
    plausible = seed / BELIEVED <= ns <= seed * BELIEVED and error < ns / 2
    return ns if plausible else seed


def scaled(model: CostModel, a_mem: float) -> CostModel:
    """Return a model in another unit: the one in which reading a token costs `a_mem`."""
    unit = a_mem / model.a_mem
    return CostModel(*(unit * getattr(model, f.name) for f in fields(CostModel)))


def believable(model: CostModel, seed: CostModel) -> bool:
    """Tell whether the rows that cost as much as reading are as many as a seed's, within bounds.

    They are not where a launch took so long that neither reading nor rows could be seen.
    """
    if not model.a_mem or not model.a_row:
        return False
    ratio = model.a_mem / model.a_row / (seed.a_mem / seed.a_row)
    return 1 / BELIEVED <= ratio <= BELIEVED
