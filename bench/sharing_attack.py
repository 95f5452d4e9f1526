"""The attack part of `kvkeep bench sharing`: audits of a policy, and what they say as figures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from bench.harness import Estimate, Figure, Goal, Row
from kvkeep.audit import Options, Report, audit, cast_of
from tests.servers import Server

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
AUDITED: Final = {"victim": 0.3, "attacker": 0.3, "sybil-1": 0.1, "sybil-2": 0.1}
"""Beside the attacker k - 1 accounts; what they leave of the pool holds public pages."""
AUDIT_PAGES: Final = 8192
PRIVATE: Final = frozenset({"isolate", "selective", "dp"})
"""Policies that promise to tell nothing."""


def attacked(
    server: Server, seed: int, *, settle_s: float, quick: bool, patient: bool = True
) -> Report:
    """Return the audit of a server by its index channels.

    Not `patient`: of one that promises nothing, with little time for channels that show nothing.
    """
    told = Options(
        server.url,
        cast_of([f"{name}={server.keys[name]}" for name in AUDITED]),
        channels=INDEX_CHANNELS[:QUICK_CHANNELS] if quick else INDEX_CHANNELS,
        margin=0.2 if quick else 0.03,
        seconds=10.0 if quick else 3600.0 if patient else 120.0,
        least_pairs=0 if quick else 128,
        settle_s=settle_s,
        batch=128 if settle_s and not quick else 4,
        per_second=1000.0,
        prompt_tokens=512,
        seed=seed,
    )
    return asyncio.run(audit(told))


def attack_figures(policy: str, reports: Sequence[Report]) -> list[Figure]:
    """Return the worst channel's AUC over all seeds, its half-width, and if chance is inside."""
    weighed = [
        finding.evidence
        for report in reports
        for finding in report.channels
        if finding.evidence is not None
    ]
    if not weighed:
        return []
    worst = max(weighed, key=lambda evidence: abs(evidence.auc.value - 0.5)).auc
    pairs = min(evidence.pairs for evidence in weighed)
    name = f"attack_auc_private_{policy}"
    goal = Goal(">=", 0.95) if policy == "share_all" else None
    figures = [Figure(name, Estimate(worst.value, worst.low, worst.high, pairs), goal)]
    if policy in PRIVATE:
        width = max(evidence.auc.halfwidth for evidence in weighed)
        inside = float(all(evidence.auc.holds_chance for evidence in weighed))
        figures += [
            Figure(f"{name}_halfwidth", certain(width, pairs), Goal("<=", 0.03)),
            Figure(f"{name}_holds_chance", certain(inside, pairs), Goal(">=", 1.0)),
        ]
    return figures


def attack_rows(policy: str, reports: Sequence[Report]) -> list[Row]:
    """Return every channel of every audit as a row."""
    rows: list[Row] = []
    for report in reports:
        for finding in report.channels:
            evidence = finding.evidence
            rows.append(
                {
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
