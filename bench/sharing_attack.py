"""The attack part of `kvkeep bench sharing`: audits of a policy, and what they say as figures.

Before an audit, bystanders send a public prompt, more of them than a policy asks for, and every
prompt of the audit begins with it: so there is something public to go on from. Answers have two
tokens and votes no bound: else the monitor would take the attacker for one and leave it alone in
its own scope, and votes would run out, and the index would not be asked. A control audits what
enough accounts did send: a policy that shares must show it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import httpx

from bench.harness import Estimate, Figure, Goal, Row
from bench.load import TIMEOUT_S
from bench.public_prompts import public_prompts
from bench.sharing_target import Target
from bench.sharing_trace import K
from kvkeep.audit import Options, Report, audit, cast_of
from kvkeep.audit.prober import Clock, Prober
from kvkeep.audit.prompts import WORDS
from kvkeep.audit.target import Account

INDEX_CHANNELS: Final = (
    "ttft",
    "cached_tokens",
    "early_bird",
    "reply_order",
    "sybils",
    "boundary",
    "sentinel",
)
QUICK_CHANNELS: Final = 2
CAST: Final = {"victim": 0.3, "attacker": 0.3, "sybil-1": 0.1, "sybil-2": 0.1}
"""Beside the attacker k - 1 accounts; what all leave of the pool holds public pages."""
CONTROL_CAST: Final = dict.fromkeys((*CAST, "sybil-3"), 0.06)
"""One account more, and room for what becomes public by it."""
ANSWER_TOKENS: Final = 2
UNBOUND: Final = ("--share-units-per-day", "1000000")
"""Of the audited server."""
BYSTANDERS: Final = tuple(f"bystander-{i}" for i in range(K + 1))
AUDITED: Final = CAST | dict.fromkeys(BYSTANDERS, 0.02)
CONTROLLED: Final = CONTROL_CAST | dict.fromkeys(BYSTANDERS, 0.02)
BEHIND: Final = public_prompts(1)[0][:1200]
"""Some 300 tokens that are public before an audit begins."""
AUDIT_PAGES: Final = 16384
"""So many that what one turn of every channel plants is still there when it is asked for: a victim
whose prompts were evicted would tell nothing, and the audit would praise the policy for it."""
PROMPT_TOKENS: Final = 512
"""Of each prompt, behind what is public."""
BATCH: Final = 32
CONTROL_BATCH: Final = 4
"""So few that what a small part of the pool holds of one turn is there when it is asked for."""
SEEDS: Final = (1, 2, 3)
PATIENT_S: Final = 3600.0
IMPATIENT_S: Final = 120.0
"""Of what promises nothing: little time for channels that show nothing."""
QUICK_S: Final = 10.0
PRIVATE: Final = frozenset({"isolate", "selective", "dp"})
"""Policies that promise to tell nothing."""
APART: Final = PRIVATE | {"vllm_salted"}
"""And a peer's that the same is asked of: how narrow the intervals are counts there."""


def make_public(target: Target, settle_s: float) -> None:
    """Let every bystander send what the audit's prompts begin with, and wait for epochs to end."""

    async def send() -> None:
        async with httpx.AsyncClient(
            base_url=target.url, transport=target.transport(), timeout=TIMEOUT_S
        ) as client:
            prober = Prober(client, "demo", per_second=1000.0, clock=Clock())
            for name, word in zip(BYSTANDERS, WORDS, strict=False):
                account = Account(name, target.keys[name])
                await prober.choose_endpoint(account, f"{BEHIND} {word}")

    asyncio.run(send())
    time.sleep(settle_s)


def attacked(target: Target, seed: int, *, settle_s: float, quick: bool, seconds: float) -> Report:
    """Return the audit of a server by its index channels, within so many seconds."""
    make_public(target, settle_s)
    told = Options(
        target.url,
        cast_of([f"{name}={target.keys[name]}" for name in CAST]),
        channels=INDEX_CHANNELS[:QUICK_CHANNELS] if quick else INDEX_CHANNELS,
        behind=BEHIND,
        margin=0.2 if quick else 0.03,
        seconds=QUICK_S if quick else seconds,
        least_pairs=0 if quick else 128,
        settle_s=settle_s,
        batch=BATCH if settle_s and not quick else 4,
        per_second=1000.0,
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
        seed=seed,
    )
    return asyncio.run(audit(told, transport=target.transport()))


def attacked_by_enough(target: Target, seed: int, *, settle_s: float) -> Report:
    """Return the audit of what k accounts sent, the victim the last of them: it must be seen."""
    make_public(target, settle_s)
    told = Options(
        target.url,
        cast_of([f"{name}={target.keys[name]}" for name in CONTROL_CAST]),
        channels=("sybils",),
        margin=0.03,
        seconds=300.0,
        least_pairs=32,
        settle_s=settle_s,
        batch=CONTROL_BATCH,
        per_second=1000.0,
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
        behind=BEHIND,
        seed=seed,
    )
    return asyncio.run(audit(told, transport=target.transport()))


def attack_figures(policy: str, reports: Sequence[Report]) -> list[Figure]:
    """Return the worst channel's AUC over all seeds, its half-width, and if chance is inside.

    It is not where a channel was blind: what was not seen holds nothing. Goals are ours alone: what
    is measured of a peer is reported, and a channel that a peer does not offer counts for nothing.
    """
    findings = [finding for report in reports for finding in report.channels]
    weighed = [finding.evidence for finding in findings if finding.evidence is not None]
    if not weighed:
        return []
    worst = max(weighed, key=lambda evidence: abs(evidence.auc.value - 0.5)).auc
    pairs = min(evidence.pairs for evidence in weighed)
    name = f"attack_auc_private_{policy}"
    goal = Goal(">=", 0.95) if policy == "share_all" else None
    figures = [Figure(name, Estimate(worst.value, worst.low, worst.high, pairs), goal)]
    if policy in APART:
        ours = policy in PRIVATE
        width = max(evidence.auc.halfwidth for evidence in weighed)
        blind = [f for f in findings if f.evidence is None and (ours or f.outcome != "skipped")]
        inside = float(not blind and all(evidence.auc.holds_chance for evidence in weighed))
        figures += [
            Figure(f"{name}_halfwidth", certain(width, pairs), Goal("<=", 0.03) if ours else None),
            Figure(f"{name}_holds_chance", certain(inside, pairs), Goal(">=", 1) if ours else None),
        ]
    return figures


def control_figures(policy: str, report: Report) -> list[Figure]:
    """Return the AUC of what k accounts sent: an audit that misses it would see nothing."""
    weighed = [found.evidence for found in report.channels if found.evidence is not None]
    goal = Goal(">=", 0.95)
    return [
        Figure(
            f"attack_auc_sent_by_k_{policy}",
            Estimate(one.auc.value, one.auc.low, one.auc.high, one.pairs),
            goal,
        )
        for one in weighed
    ]


def attack_rows(engine: str, policy: str, reports: Sequence[Report]) -> list[Row]:
    """Return every channel of every audit as a row."""
    rows: list[Row] = []
    for report in reports:
        for finding in report.channels:
            evidence = finding.evidence
            rows.append(
                {
                    "engine": engine,
                    "policy": policy,
                    "seed": report.seed,
                    "channel": finding.facts.name,
                    "outcome": finding.outcome,
                    "auc": evidence.auc.value if evidence else None,
                    "halfwidth": evidence.auc.halfwidth if evidence else None,
                    "pairs": evidence.pairs if evidence else None,
                }
            )
    return rows


def certain(value: float, samples: int) -> Estimate:
    """Return an estimate without an interval of its own."""
    return Estimate(value, value, value, samples)
