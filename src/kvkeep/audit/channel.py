"""What every channel is: a plan of pairs, a run, a score; and the one that most of them are.

A trial has two prompts of equal length, and a coin says which of them the victim sends. The
attacker then asks for both. Whatever it measures of the prompt that was sent is the `hit`, of the
other the `miss`; small values mean "cached".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from kvkeep.audit.prober import Prober, Prompt, Reply
from kvkeep.audit.prompts import PromptMaker, Twins
from kvkeep.audit.target import Account, Cast


class Observable(Enum):
    """What the attacker looks at; each has a positive control of its own."""

    TTFT = "time to first token"
    CACHED_TOKENS = "cached_tokens"
    ORDER = "order of replies"
    EVICTION = "fate of own entries"


Unit = Literal["ms", "tokens", "turn", "evicted"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a channel is."""

    name: str
    about: str
    observable: Observable
    unit: Unit = "ms"


class Sending(NamedTuple):
    """A prompt and who sends it."""

    account: Account
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Trial:
    """What is sent before, and the two prompts that the attacker asks for."""

    planted: tuple[Sending, ...]
    hit: Prompt
    miss: Prompt
    hit_first: bool
    """The coin."""


class Pair(NamedTuple):
    """What the attacker saw of the prompt that was sent, and of the one that was not."""

    hit: float
    miss: float


@dataclass(frozen=True, slots=True)
class Stage:
    """What a channel works with."""

    prober: Prober
    cast: Cast
    maker: PromptMaker
    settle_s: float = 0.0
    """Between what the victim sends and what the attacker asks."""
    threshold_ms: float | None = None
    """Between a hit and a miss, from the control of the time to first token."""


class Channel(Protocol):
    """One way to learn of another tenant's prompts."""

    @property
    def facts(self) -> Facts:
        """Return what the channel is."""

    async def prepare(self, stage: Stage) -> str | None:
        """Return why the target does not have this channel, None where it can be tried."""

    def plan(self, stage: Stage, count: int) -> Sequence[Trial]:
        """Return so many trials, or fewer where they are costly, each with a coin of its own."""

    async def run(self, stage: Stage, trials: Sequence[Trial]) -> Sequence[Pair]:
        """Send what was planned; trials whose token counts differ are left out."""

    def score(self, pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
        """Return figures of this channel's own."""


def milliseconds(reply: Reply) -> float:
    """Return the time to the first token in milliseconds."""
    return reply.seconds * 1e3


def of_twins(stage: Stage, twins: Twins, planter: Account) -> Trial:
    """Return the trial of two texts of which the planter sends the coin's."""
    coin = stage.maker.chance.random() < 0.5
    hit, miss = map(Prompt, twins if coin else reversed(twins))
    return Trial((Sending(planter, hit),), hit, miss, coin)


def same_length(stage: Stage, hit: Reply, miss: Reply) -> bool:
    """Tell whether the target counted the same number of tokens, as far as it says."""
    if hit.prompt_tokens == miss.prompt_tokens:
        return True
    stage.prober.unequal += 1
    return False


async def plant(stage: Stage, trials: Sequence[Trial]) -> None:
    """Send what comes before, then wait."""
    for trial in trials:
        for account, prompt in trial.planted:
            await stage.prober.ask(account, prompt)
    await stage.prober.settle(stage.settle_s)


@dataclass(frozen=True, slots=True)
class PlantAndProbe:
    """Plants prompts, asks for both of each pair, looks at one thing of each reply."""

    facts: Facts
    make: Callable[[Stage], Trial]
    observe: Callable[[Reply], float] = milliseconds
    ready: Callable[[Stage], Awaitable[str | None]] | None = None
    figures: Callable[[Sequence[Pair], Sequence[Pair]], Mapping[str, float]] | None = None
    asker: Account | None = None
    """Who asks in the attacker's place."""

    async def prepare(self, stage: Stage) -> str | None:
        """Return what is missing."""
        return await self.ready(stage) if self.ready else None

    def plan(self, stage: Stage, count: int) -> Sequence[Trial]:
        """Return trials as `make` makes them."""
        return [self.make(stage) for _ in range(count)]

    async def run(self, stage: Stage, trials: Sequence[Trial]) -> Sequence[Pair]:
        """Plant all, then ask for the two of each trial, one right after the other."""
        await plant(stage, trials)
        found = []
        for trial in trials:
            order = (trial.hit, trial.miss) if trial.hit_first else (trial.miss, trial.hit)
            asker = self.asker or stage.cast.attacker
            replies = [await stage.prober.ask(asker, prompt) for prompt in order]
            hit, miss = replies if trial.hit_first else reversed(replies)
            if same_length(stage, hit, miss):
                found.append(Pair(self.observe(hit), self.observe(miss)))
        return found

    def score(self, pairs: Sequence[Pair], control: Sequence[Pair]) -> Mapping[str, float]:
        """Return figures of this channel's own."""
        return self.figures(pairs, control) if self.figures else {}
