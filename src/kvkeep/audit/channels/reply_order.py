"""PromptPeek's signal (NDSS 2025): in a full queue, longer matches are served first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvkeep.audit.channel import (
    Facts,
    Observable,
    Pair,
    Stage,
    Trial,
    of_twins,
    plant,
    same_length,
)
from kvkeep.audit.prober import Prompt, Refused

DUMMIES: Final = 4
"""Before the candidates, and as many after them."""
TRIALS_PER_BURST: Final = 4


@dataclass(frozen=True, slots=True)
class ReplyOrder:
    """Sends candidates between dummies, all at once, and looks which are answered first."""

    own: bool = False
    """Whether the attacker plants: the control."""

    @property
    def facts(self) -> Facts:
        """Return what the channel is."""
        return Facts(
            "reply_order",
            "of prompts sent at once, one that the victim sent is answered first",
            Observable.ORDER,
            "turn",
        )

    async def prepare(self, stage: Stage) -> str | None:
        """Return a reason where the target does not take a burst."""
        count = 2 * DUMMIES + 2 * TRIALS_PER_BURST
        try:
            await stage.prober.burst(stage.cast.attacker, self._dummies(stage, count))
        except Refused as refused:
            return f"the target refuses {count} requests at a time ({refused.status})"
        return None

    def plan(self, stage: Stage, count: int) -> Sequence[Trial]:
        """Return trials of plain twins."""
        planter = stage.cast.attacker if self.own else stage.cast.victim
        return [of_twins(stage, stage.maker.twins(), planter) for _ in range(count)]

    async def run(self, stage: Stage, trials: Sequence[Trial]) -> Sequence[Pair]:
        """Plant all, then send bursts."""
        await plant(stage, trials)
        found: list[Pair] = []
        for start in range(0, len(trials), TRIALS_PER_BURST):
            found += await self._burst(stage, trials[start : start + TRIALS_PER_BURST])
        return found

    def score(self, pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
        """Return nothing beyond the AUC, which is how often what was sent came first."""
        return {}

    async def _burst(self, stage: Stage, trials: Sequence[Trial]) -> list[Pair]:
        candidates = [
            prompt
            for trial in trials
            for prompt in ((trial.hit, trial.miss) if trial.hit_first else (trial.miss, trial.hit))
        ]
        before, after = self._dummies(stage, DUMMIES), self._dummies(stage, DUMMIES)
        replies = await stage.prober.burst(stage.cast.attacker, [*before, *candidates, *after])
        found = []
        for index, trial in enumerate(trials):
            start = DUMMIES + 2 * index
            hit, miss = (
                replies[start : start + 2] if trial.hit_first else replies[start : start + 2][::-1]
            )
            if same_length(stage, hit, miss):
                # The place inside the pair: ranks of a whole burst would hide small leads.
                found.append(Pair(float(hit.rank > miss.rank), float(miss.rank > hit.rank)))
        return found

    @staticmethod
    def _dummies(stage: Stage, count: int) -> list[Prompt]:
        return [Prompt(stage.maker.text()) for _ in range(count)]
