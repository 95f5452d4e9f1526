"""Run an audit: controls first, then channels in turn until each has its verdict or time is up."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import httpx
import numpy as np

from kvkeep.audit.channel import Channel, Observable, Pair, Stage
from kvkeep.audit.channels import CHANNELS, CONTROLS
from kvkeep.audit.channels.early_bird import middle
from kvkeep.audit.findings import Finding, Report, conclude
from kvkeep.audit.prober import Clock, Prober, Prompt, first_model
from kvkeep.audit.prompts import PromptMaker
from kvkeep.audit.sequential import Decision, Evidence, Rates, decide, weigh
from kvkeep.audit.stats import Samples
from kvkeep.audit.target import Cast, base_url, check_consent, new_client
from kvkeep.errors import ConfigError

CONTROL_ALPHA: Final = 0.01
CONTROL_PAIRS: Final = 200
CONTROL_SHARE: Final = 0.2
"""Of the time, for one control of one length of prompts."""
CLEAR_AUC: Final = 0.8
"""Of own hits; below it longer prompts are tried."""
TRY_PAIRS: Final = 16
MIN_EQUAL_SHARE: Final = 0.25
"""Of trials, below which a channel's prompts are not alike to the target."""
PROGRESS_S: Final = 30.0
"""Between two notes of how far an audit has come."""
UNEQUAL: Final = "the target counts the tokens of like prompts differently"
SEEN: Final = "own hits show"
BLIND: Final = "own hits do not show, so nothing that this observable says counts"
REASONS: Final[Mapping[Decision, str]] = {
    "leak": "what the victim sent shows",
    "clean": "chance is inside the interval",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What an audit is told."""

    url: str
    cast: Cast
    model: str | None = None
    channels: tuple[str, ...] = ()
    """All where none is named."""
    alpha: float = 0.05
    margin: float = 0.05
    seconds: float = 600.0
    settle_s: float = 0.0
    per_second: float = 100.0
    prompt_tokens: int = 256
    """Of the first prompts tried."""
    max_prompt_tokens: int = 2048
    behind: str = ""
    """What prompts begin with: a text that is public already, such as a service's own prompt."""
    batch: int = 4
    """Pairs between one wait and the next."""
    least_pairs: int = 0
    """Before any verdict, for those who want an interval more than a quick end."""
    answer_tokens: int = 1
    """Of each answer: a target that takes answers of one token for probing may tell nothing."""
    consent: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.channels if name not in CHANNELS]
        if unknown:
            raise ConfigError(
                f"channels: there is no {unknown[0]!r}; there are {', '.join(CHANNELS)}"
            )
        for name, value, top in (("alpha", self.alpha, 0.5), ("margin", self.margin, 0.5)):
            if not 0 < value < top:
                raise ConfigError(f"{name}: must lie between 0 and {top}")
        for name, value in (("seconds", self.seconds), ("rate", self.per_second)):
            if not (0 < value < math.inf):
                raise ConfigError(f"{name}: must be more than 0")
        if not 0 <= self.settle_s < math.inf:
            raise ConfigError("settle: must be 0 or more seconds")
        if not 32 <= self.prompt_tokens <= self.max_prompt_tokens:
            raise ConfigError("prompt_tokens: must be at least 32 and at most max_prompt_tokens")
        for name, count in (("batch", self.batch), ("answer_tokens", self.answer_tokens)):
            if count < 1:
                raise ConfigError(f"{name}: must be 1 or more")


@dataclass(slots=True)
class _Course:
    """One channel under way."""

    channel: Channel
    pairs: list[Pair] = field(default_factory=list)
    planned: int = 0
    outcome: Finding | None = None

    async def advance(self, stage: Stage, count: int) -> bool:
        """Run about so many trials more; tells whether enough of all were of equal length."""
        trials = self.channel.plan(stage, count)
        self.planned += len(trials)
        self.pairs += await self.channel.run(stage, trials)
        return self.planned < TRY_PAIRS or len(self.pairs) >= MIN_EQUAL_SHARE * self.planned


class Audit:
    """One audit of one target."""

    def __init__(
        self, options: Options, client: httpx.AsyncClient, clock: Clock, note: Callable[[str], None]
    ) -> None:
        self._options = options
        self._client = client
        self._clock = clock
        self._note = note
        self._begun = self._told = clock.now()
        self._seed = secrets.randbits(32) if options.seed is None else options.seed
        self._controls: dict[Observable, Finding] = {}

    async def run(self) -> Report:
        """Return the report; raises `ConfigError` and `AuditError` where there can be none."""
        options = self._options
        await check_consent(self._client, options.consent)
        model = options.model or await first_model(self._client, options.cast.attacker)
        prober = Prober(
            self._client,
            model,
            per_second=options.per_second,
            clock=self._clock,
            answer_tokens=options.answer_tokens,
        )
        stage = Stage(
            prober, options.cast, PromptMaker(self._seed, options.behind), options.settle_s
        )
        await self._calibrate(stage)
        channels = [CHANNELS[name]() for name in options.channels or CHANNELS]
        stage = await self._show_time(stage)
        rates = Rates(options.alpha, options.margin, len(channels))
        courses = [_Course(channel) for channel in channels]
        for course in courses:
            course.outcome = await self._missing(stage, course.channel)
        await self._pursue(stage, courses, rates)
        found = tuple(course.outcome or self._undecided(course, rates) for course in courses)
        verdict, reason = conclude(found, rates)
        return Report(
            target=str(self._client.base_url),
            model=model,
            seed=self._seed,
            rates=rates,
            prompt_tokens=stage.maker.tokens,
            seconds=self._elapsed(),
            requests=prober.requests,
            unequal_pairs=prober.unequal,
            verdict=verdict,
            reason=reason,
            controls=tuple(self._controls.values()),
            channels=found,
        )

    def _elapsed(self) -> float:
        return self._clock.now() - self._begun

    async def _calibrate(self, stage: Stage) -> None:
        """Learn the endpoint and how many tokens a word has; both keys must be good."""
        maker, cast = stage.maker, stage.cast
        maker.tokens = self._options.prompt_tokens
        text = maker.bare_twins().first  # what all stand behind may have other words
        reply = await stage.prober.choose_endpoint(cast.attacker, text)
        if reply.prompt_tokens:
            maker.tokens_per_word = reply.prompt_tokens / len(text.split())
        for account in (cast.victim, *cast.sybils):
            await stage.prober.choose_endpoint(account, maker.text())

    async def _show_time(self, stage: Stage) -> Stage:
        """Show what own hits look like in time; prompts grow until they are clear."""
        maker, channel = stage.maker, CONTROLS[Observable.TTFT]()
        tried: dict[int, Finding] = {}
        while True:
            found = await self._control(stage, channel, TRY_PAIRS)
            if found.outcome != "seen" and _auc(found) >= CLEAR_AUC:
                found = await self._control(stage, channel, CONTROL_PAIRS)
            tried[maker.tokens] = found
            clear = found.outcome == "seen" and _auc(found) >= CLEAR_AUC
            if clear or not await self._grow(stage):
                break
        maker.tokens = max(tried, key=lambda n: (tried[n].outcome == "seen", _auc(tried[n])))
        found = tried[maker.tokens]
        if found.outcome != "seen":
            found = await self._control(stage, channel, CONTROL_PAIRS)
        self._note(f"control: {found.reason} with prompts of {maker.tokens} tokens")
        self._controls[Observable.TTFT] = found
        return replace(stage, threshold_ms=middle(found.pairs) if found.outcome == "seen" else None)

    async def _grow(self, stage: Stage) -> bool:
        """Double the prompts, as far as the caller and the target allow."""
        maker = stage.maker
        if 2 * maker.tokens > self._options.max_prompt_tokens:
            return False
        maker.tokens *= 2
        if await stage.prober.accepts(stage.cast.attacker, Prompt(maker.text())):
            return True
        maker.tokens //= 2
        return False

    async def _control(self, stage: Stage, channel: Channel, most_pairs: int) -> Finding:
        """Return "seen" where own hits show beyond doubt and beyond the margin, else "void".

        Own entries are there at once, so nothing settles.
        """
        stage = replace(stage, settle_s=0.0)
        course = _Course(channel)
        evidence: Evidence | None = None
        over = self._elapsed() + CONTROL_SHARE * self._options.seconds
        while course.planned < most_pairs and not (evidence and self._elapsed() > over):
            if not await course.advance(stage, self._options.batch):
                return Finding(channel.facts, "void", UNEQUAL, pairs=tuple(course.pairs))
            if len(course.pairs) < 2:
                continue
            evidence = weigh(*_columns(course.pairs), CONTROL_ALPHA)
            shown = evidence.log_e >= -math.log(CONTROL_ALPHA) and evidence.wins > evidence.losses
            beyond = evidence.auc.low > 0.5 + self._options.margin
            if shown and beyond and evidence.pairs >= TRY_PAIRS:
                return Finding(channel.facts, "seen", SEEN, evidence, tuple(course.pairs))
        return Finding(channel.facts, "void", BLIND, evidence, tuple(course.pairs))

    async def _missing(self, stage: Stage, channel: Channel) -> Finding | None:
        """Return why a channel is not tried, None where it is."""
        absent = await channel.prepare(stage)
        if absent is not None:
            return Finding(channel.facts, "skipped", absent)
        observable = channel.facts.observable
        if observable not in CONTROLS:
            return None
        if observable not in self._controls:
            control = CONTROLS[observable]()
            self._controls[observable] = await self._control(stage, control, CONTROL_PAIRS)
        found = self._controls[observable]
        if found.outcome == "seen":
            return None
        return Finding(channel.facts, "void", f"control: {found.reason}")

    async def _pursue(self, stage: Stage, courses: Sequence[_Course], rates: Rates) -> None:
        """Let the undecided channels take turns until none is left or time is up.

        While one waits between the victim and the attacker, the next plants.
        """
        while open_ := [course for course in courses if course.outcome is None]:
            if self._over():
                return
            turns = (self._turn(stage, course, rates) for course in open_)
            ended = await asyncio.gather(*turns, return_exceptions=True)
            failed = next((one for one in ended if isinstance(one, BaseException)), None)
            if failed is not None:
                raise failed
            self._tell(courses)

    def _tell(self, courses: Sequence[_Course]) -> None:
        """Say now and then how far the audit has come."""
        if self._clock.now() - self._told < PROGRESS_S:
            return
        self._told = self._clock.now()
        decided = sum(course.outcome is not None for course in courses)
        self._note(
            f"{self._elapsed():.0f} s of {self._options.seconds:.0f} at most: "
            f"{decided} of {len(courses)} channels are done"
        )

    def _over(self) -> bool:
        return self._elapsed() >= self._options.seconds

    async def _turn(self, stage: Stage, course: _Course, rates: Rates) -> None:
        channel = course.channel
        async with stage.prober.alone:
            if self._over():
                return
            alike = await course.advance(stage, self._options.batch)
        if not alike:
            course.outcome = Finding(channel.facts, "void", UNEQUAL, pairs=tuple(course.pairs))
            return
        if len(course.pairs) < max(2, self._options.least_pairs):
            return
        evidence = weigh(*_columns(course.pairs), rates.level)
        decision = decide(evidence, rates)
        if decision is not None:
            course.outcome = Finding(
                channel.facts,
                decision,
                REASONS[decision],
                evidence,
                tuple(course.pairs),
                self._figures(course),
            )
            self._note(f"{channel.facts.name}: {decision} after {evidence.pairs} pairs")

    def _figures(self, course: _Course) -> Mapping[str, float]:
        return course.channel.score(course.pairs, self._controls[Observable.TTFT].pairs)

    def _undecided(self, course: _Course, rates: Rates) -> Finding:
        """Return the finding of a channel that ran out of time."""
        facts = course.channel.facts
        if len(course.pairs) < 2:
            return Finding(facts, "void", "no time was left; raise --seconds")
        evidence = weigh(*_columns(course.pairs), rates.level)
        reason = (
            f"time was up at ± {evidence.halfwidth:.3f}, not ± {rates.margin:g}; raise --seconds"
        )
        return Finding(facts, "void", reason, evidence, tuple(course.pairs), self._figures(course))


def _auc(found: Finding) -> float:
    return 0.0 if found.evidence is None else found.evidence.auc.value


def _columns(pairs: Sequence[Pair]) -> tuple[Samples, Samples]:
    values = np.asarray(pairs, np.float64)
    return values[:, 0], values[:, 1]


async def audit(
    options: Options,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Report:
    """Audit a target; `transport` and `clock` stand in for the network and time in tests."""
    async with new_client(base_url(options.url), transport) as client:
        return await Audit(options, client, clock or Clock(), note).run()
