"""The fate of one's own entries: in a shared pool another tenant's load evicts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from kvkeep.audit.channel import Facts, Observable, Pair, Sending, Stage, Trial
from kvkeep.audit.prober import Prompt
from kvkeep.audit.target import Account

FIRST_LOAD: Final = 4
"""Prompts of the first load tried."""


class Eviction:
    """Keeps an entry of its own while the victim works, or does not, and asks if it is still there.

    How much load evicts is found on the attacker's own entries, which is the control too.
    """

    def __init__(self, *, most_tokens: int = 32_768) -> None:
        self._most_tokens = most_tokens
        self._load = 0

    @property
    def facts(self) -> Facts:
        """Return what the channel is."""
        return Facts(
            "eviction",
            "an own entry goes when the victim is busy",
            Observable.EVICTION,
            "evicted",
        )

    async def prepare(self, stage: Stage) -> str | None:
        """Find the load that evicts an own entry."""
        if stage.threshold_ms is None:
            return "the time to first token does not tell a hit from a miss"
        load = FIRST_LOAD
        while load * stage.maker.tokens <= self._most_tokens:
            if await self._evicted(stage, stage.cast.attacker, load):
                self._load = load
                return None
            load *= 2
        return f"own entries outlive {self._most_tokens:,} tokens of own load"

    def plan(self, stage: Stage, count: int) -> Sequence[Trial]:
        """Return a trial, whatever was asked for: each costs as much as many of other channels.

        `planted` is the load, the two prompts are the entries kept.
        """
        victim = stage.cast.victim
        load = tuple(Sending(victim, Prompt(stage.maker.text())) for _ in range(self._load))
        kept, other = Prompt(stage.maker.text()), Prompt(stage.maker.text())
        return [Trial(load, kept, other, stage.maker.chance.random() < 0.5)]

    async def run(self, stage: Stage, trials: Sequence[Trial]) -> Sequence[Pair]:
        """Keep one entry through the victim's load and one through its rest, the coin's first."""
        found = []
        for trial in trials:
            seen: dict[bool, float] = {}
            for busy in (True, False) if trial.hit_first else (False, True):
                kept = trial.hit if busy else trial.miss
                await stage.prober.ask(stage.cast.attacker, kept)
                if busy:
                    for account, prompt in trial.planted:
                        await stage.prober.ask(account, prompt)
                seen[busy] = -float(await self._gone(stage, kept))
            found.append(Pair(seen[True], seen[False]))
        return found

    def score(self, pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
        """Return how often an entry went."""
        count = max(1, len(pairs))
        return {
            "load_prompts": float(self._load),
            "gone_busy_share": -sum(pair.hit for pair in pairs) / count,
            "gone_idle_share": -sum(pair.miss for pair in pairs) / count,
        }

    async def _evicted(self, stage: Stage, account: Account, load: int) -> bool:
        kept = Prompt(stage.maker.text())
        await stage.prober.ask(stage.cast.attacker, kept)
        for _ in range(load):
            await stage.prober.ask(account, Prompt(stage.maker.text()))
        return await self._gone(stage, kept)

    @staticmethod
    async def _gone(stage: Stage, kept: Prompt) -> bool:
        assert stage.threshold_ms is not None
        reply = await stage.prober.ask(stage.cast.attacker, kept)
        return reply.seconds * 1e3 > stage.threshold_ms
