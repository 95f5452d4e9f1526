"""Development contexts answered a seed after the other, each kept: choosing may stop and go on.

A part is what some policies came to on one seed's contexts. Parts are kept in `build/eviction`, by
commit, and joined as if they had been answered together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch

from bench.eviction_policies import Masks, everything
from bench.eviction_tally import Found, Tally, World, gathered, refuse_unable
from bench.kept import BUILD, Kept
from bench.quality_run import Item
from kvkeep.cli.console import NOTES

FOLDER: Final = BUILD / "eviction"
LEARNT: Final = 0.9
"""Of a recall model's answers over all tokens, before a rule is chosen by a task."""
APART: Final = 1_000_000
"""Between the numbers of two seeds' contexts, which are others."""


class Told(msgspec.Struct, frozen=True):
    """What one policy came to on one model's contexts of one seed."""

    items: list[Item]
    kept: list[float]
    rows: list[tuple[float, float, float]]


Part = dict[str, dict[str, Told]]
"""By policy and model."""


class Enough(Exception):
    """As many parts were answered as were asked for; those that are kept are not lost."""


@dataclass
class Learner:
    """Answers development contexts."""

    models: Sequence[World]
    seeds: Sequence[int]
    quick: bool = False
    folder: Path | None = FOLDER
    """None: nothing is kept."""
    parts: int | None = None
    """So many more are answered before `Enough`; None: all."""

    def tried(
        self,
        protocol: str,
        title: str,
        policies: Mapping[str, Masks],
        seeds: Sequence[int],
        *,
        twice: bool,
    ) -> Found:
        """Return what policies came to on the contexts of some of the seeds.

        `twice`: prompts are read a second time, for those who look at that.
        """
        told = {"full": everything, **policies}
        found: list[Part] = []
        for seed in seeds:
            name = f"{protocol}-{title}-{seed}"
            kept = None if self.folder is None else Kept(Part, self.folder)
            part = kept.get(name) if kept else None
            if part is None:
                part = self._answered(protocol, told, seed, twice=twice)
                NOTES.print(f"{name}: {len(told)} policies answered")
                if kept:
                    kept.put(name, part)
            found.append({policy: part[policy] for policy in told})
        return joined(found, [world.name for world in self.models if world.gated])

    def _answered(
        self, protocol: str, policies: Mapping[str, Masks], seed: int, *, twice: bool
    ) -> Part:
        if self.parts is not None:
            if self.parts == 0:
                raise Enough
            self.parts -= 1
        found = gathered(
            protocol, self.models, policies, seeds=(seed,), quick=self.quick, twice=twice
        )
        return {
            policy: {model: _told(tally) for model, tally in own.items()}
            for policy, own in found.items()
        }


def of_seed(found: Found, number: int) -> Found:
    """Return what of joined outcomes belongs to the seed that came so many before it."""
    return {
        policy: {
            model: Tally([item for item in tally.items if item.context // APART == number])
            for model, tally in own.items()
        }
        for policy, own in found.items()
    }


def _told(tally: Tally) -> Told:
    return Told(tally.items, [float(heads.mean()) for heads in tally.heads], tally.rows)


def joined(parts: Sequence[Part], gated: Sequence[str]) -> Found:
    """Return several seeds' outcomes as of one, without tasks that a gated model can't do.

    A task counts from `LEARNT` on: which of them are judged is the held-out contexts' affair.
    """
    found: Found = {}
    for number, part in enumerate(parts):
        for policy, own in part.items():
            for model, told in own.items():
                tally = found.setdefault(policy, {}).setdefault(model, Tally())
                tally.items += [
                    item._replace(context=item.context + number * APART) for item in told.items
                ]
                tally.heads += [torch.tensor([[kept]]) for kept in told.kept]
                tally.rows += told.rows
    refuse_unable(found, gated, LEARNT)
    return found
