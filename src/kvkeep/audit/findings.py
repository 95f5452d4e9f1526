"""What an audit found, by channel and in one word, and the document it is kept as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from kvkeep.audit.channel import Facts, Observable, Pair
from kvkeep.audit.sequential import Evidence, Rates

Verdict = Literal["leak", "clean", "void"]
Outcome = Literal["leak", "clean", "void", "skipped", "seen"]
"""Of one channel; `skipped` where the target or the caller does not offer what it needs.

A control is `seen` or `void`.
"""

EXIT_CODES: Final[Mapping[Verdict, int]] = {"clean": 0, "leak": 3, "void": 4}

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one channel, or one control, showed."""

    facts: Facts
    outcome: Outcome
    reason: str
    evidence: Evidence | None = None
    pairs: tuple[Pair, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Json]:
        """Return the finding as JSON."""
        found: dict[str, Json] = {
            "channel": self.facts.name,
            "about": self.facts.about,
            "observable": self.facts.observable.value,
            "unit": self.facts.unit,
            "outcome": self.outcome,
            "reason": self.reason,
        }
        if self.evidence is not None:
            auc = self.evidence.auc
            found |= {
                "pairs": self.evidence.pairs,
                "wins": self.evidence.wins,
                "losses": self.evidence.losses,
                "auc": auc.value,
                "auc_low": auc.low,
                "auc_high": auc.high,
                "auc_halfwidth": auc.halfwidth,
                "won_share": self.evidence.won.value,
                "won_halfwidth": self.evidence.won.halfwidth,
                "log_likelihood_ratio": self.evidence.log_e,
                "ks_statistic": self.evidence.ks.statistic,
                "ks_p": self.evidence.ks.p,
            }
        return found | {
            "figures": dict(self.figures),
            "hit": [round(pair.hit, 4) for pair in self.pairs],
            "miss": [round(pair.miss, 4) for pair in self.pairs],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found; holds no key and no prompt."""

    target: str
    model: str
    seed: int
    rates: Rates
    prompt_tokens: int
    seconds: float
    requests: int
    unequal_pairs: int
    verdict: Verdict
    reason: str
    controls: tuple[Finding, ...]
    channels: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """Return the exit code of `kvkeep attack`."""
        return EXIT_CODES[self.verdict]

    @property
    def worst(self) -> Finding | None:
        """Return the channel whose AUC is farthest from chance."""
        weighed = [f for f in self.channels if f.evidence is not None]
        return max(weighed, key=_distance, default=None)

    def document(self) -> dict[str, Json]:
        """Return the report as JSON."""
        return {
            "target": self.target,
            "model": self.model,
            "seed": self.seed,
            "verdict": self.verdict,
            "reason": self.reason,
            "alpha": self.rates.alpha,
            "margin": self.rates.margin,
            "channels_tested": self.rates.channels,
            "prompt_tokens": self.prompt_tokens,
            "seconds": round(self.seconds, 1),
            "requests": self.requests,
            "unequal_pairs": self.unequal_pairs,
            "controls": [finding.document() for finding in self.controls],
            "channels": [finding.document() for finding in self.channels],
        }


def conclude(channels: Sequence[Finding], rates: Rates) -> tuple[Verdict, str]:
    """Return the verdict over all channels and its reason.

    Time is the observable that every cache moves: a void channel of it voids the audit. Where the
    audit sees the cache in time, an observable that does not follow even own hits (an order of
    replies that is first come, first served) voids its own channel alone.
    """

    def names(outcome: Outcome) -> list[str]:
        return [finding.facts.name for finding in channels if finding.outcome == outcome]

    if leaking := names("leak"):
        return "leak", f"{', '.join(leaking)} told the attacker what the victim had sent"
    blind = [
        f.facts.name
        for f in channels
        if f.outcome == "void" and f.facts.observable is Observable.TTFT
    ]
    if blind:
        return "void", f"no verdict on {', '.join(blind)}; their reasons are in the table"
    clean = names("clean")
    if not clean:
        return "void", "no channel could be tried; their reasons are in the table"
    aside = f"; void: {', '.join(names('void'))}" if names("void") else ""
    return "clean", f"{len(clean)} channels within {rates.margin:g} of chance{aside}"


def _distance(finding: Finding) -> float:
    return abs(finding.evidence.auc.value - 0.5) if finding.evidence is not None else 0.0
