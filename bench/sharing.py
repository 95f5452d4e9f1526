"""What sharing is worth and what it tells: every policy, on one committed trace.

Each policy gets a server of its own on the demo model, the same requests in the same order by the
same number of clients, and a pool of 30 % of what isolation would need. Requests of epochs 1 and 2
warm up. `--only shapes` does so at the shapes of a small real model, where three policies take
turns with the same requests. Then the leak audit runs against a fresh server of the same policy,
once per seed, on the channels that the index could leak by; its worst channel counts. The control
attacks what k accounts sent under `selective`, which must be seen. Audits that ended are kept in
`build/audits`, by commit, and not made again. With `--peer vllm` another engine takes the
policies' place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from bench import harness, sharing_peers, sharing_trace
from bench.harness import Cell, Estimate, Figure, Goal, Options, Report, Row, estimate
from bench.sharing_attack import (
    AUDIT_PAGES,
    AUDITED,
    CONTROLLED,
    IMPATIENT_S,
    PATIENT_S,
    PRIVATE,
    SEEDS,
    UNBOUND,
    attack_figures,
    attack_rows,
    attacked,
    attacked_by_enough,
    certain,
    control_figures,
)
from bench.sharing_kept import kept
from bench.sharing_replay import (
    OURS,
    Player,
    Replay,
    played_params,
    policy_row,
    replay,
    tenant_name,
)
from bench.sharing_server import POLICIES, QUICK_POLICIES, Policy, epochs_of, served
from bench.sharing_shapes import LIKE, at_shapes
from bench.sharing_target import Ours
from bench.sharing_trace import Ask, Shape, Texts
from kvkeep import metrics
from kvkeep.audit import Report as AuditReport
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError
from kvkeep.models.text import TextModel

EPOCH_S: Final = 10.0
AUDIT_EPOCH_S: Final = 2.0
"""Short, since an audit waits for two epochs' ends again and again."""
QUICK_EPOCH_S: Final = 1.0


PARTS: Final = ("replay", "shapes", "audit", "control")
QUICK_PARTS: Final = ("replay", "audit")
DEMO: Final = "_demo_model"
"""Ends the figures of the demo model."""


class Tried(NamedTuple):
    """What one policy cost and told, as far as it was asked."""

    played: Replay | None
    reports: list[AuditReport]
    control: AuditReport | None = None
    """Of what k accounts sent."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The trace and how to play it."""

    trace: Sequence[Ask]
    shape: Shape
    texts: Texts
    quick: bool
    parts: Sequence[str] = PARTS

    def attempt(self, policy: Policy, arguments: Sequence[str]) -> Tried:
        """Play the trace under one policy, then let it be attacked."""
        least = sharing_trace.least_pages(self.shape)
        pages = sharing_trace.pool_pages(self.trace, self.shape)
        shares = {tenant_name(n): 1 / self.shape.tenants for n in range(self.shape.tenants)}
        pool = ("--share-pool", f"{1 - least / pages:.4f}")
        if self.quick:
            # One server for both, a half each: nothing of a quick run is a figure of record.
            both = {name: part / 2 for name, part in (shares | AUDITED).items()}
            arguments = (*arguments, *epochs_of(QUICK_EPOCH_S))
            with served(policy, both, max(2 * pages, AUDIT_PAGES), *arguments, *pool) as server:
                alone = self._replay(Ours(server), policy, QUICK_EPOCH_S)
                return Tried(alone, [self._attack(Ours(server), policy, SEEDS[0], QUICK_EPOCH_S)])
        played: Replay | None = None
        if "replay" in self.parts:
            told = (*arguments, *epochs_of(EPOCH_S), *pool)
            pins = self.texts.declared
            with served(policy, shares, pages, *told, pins=pins) as server:
                played = self._replay(Ours(server), policy, EPOCH_S)
        told = (*arguments, *epochs_of(AUDIT_EPOCH_S))
        reports = [
            kept(f"{policy.name}-{seed}", partial(self._audit, policy, seed, told))
            for seed in (SEEDS if "audit" in self.parts and not policy.pins else ())
        ]
        control = None
        if "control" in self.parts and policy.name == "selective":
            control = kept(f"{policy.name}-control", partial(self._control, policy, told))
        return Tried(played, reports, control)

    def _audit(self, policy: Policy, seed: int, arguments: Sequence[str]) -> AuditReport:
        with served(policy, AUDITED, AUDIT_PAGES, *arguments, *UNBOUND) as server:
            return self._attack(Ours(server), policy, seed, AUDIT_EPOCH_S)

    def _control(self, policy: Policy, arguments: Sequence[str]) -> AuditReport:
        with served(policy, CONTROLLED, AUDIT_PAGES, *arguments, *UNBOUND) as server:
            settle_s = policy.settle_s(AUDIT_EPOCH_S)
            return attacked_by_enough(Ours(server), SEEDS[0], settle_s=settle_s)

    def _replay(self, target: Ours, policy: Policy, epoch_s: float) -> Replay:
        player = Player(target, self.texts, self.shape)
        return replay(player, self.trace, policy.settle_s(epoch_s))

    def _attack(self, target: Ours, policy: Policy, seed: int, epoch_s: float) -> AuditReport:
        seconds = PATIENT_S if policy.name in PRIVATE else IMPATIENT_S
        settle_s = policy.settle_s(epoch_s)
        report = attacked(target, seed, settle_s=settle_s, quick=self.quick, seconds=seconds)
        saved = target.counter(metrics.SAVED_TOKENS)
        NOTES.print(
            f"{policy.name}, seed {seed}: {report.verdict} after {report.seconds:.0f} s, "
            f"{saved:.0f} tokens read from others"
        )
        return report


def ratios(found: Mapping[str, Replay], model: str = "") -> list[Figure]:
    """Return the figures that compare two policies, request by request or window by window."""
    figures = []
    everything = found.get("share_all")
    for name, goal in (("selective", Goal("<=", 0.05)), ("isolate", None)):
        one = found.get(name)
        if one and everything:
            pairs = zip(one.samples, everything.samples, strict=True)
            overhead = [a.ttft_s / b.ttft_s - 1 for a, b in pairs]
            told = f"ttft_overhead_{name}_vs_share_all{model}"
            figures.append(Figure(told, estimate(overhead), goal))
    selective, isolate = found.get("selective"), found.get("isolate")
    if selective and isolate:
        gain = estimate([a / b for a, b in zip(selective.rates, isolate.rates, strict=True)])
        told = f"throughput_selective_vs_isolate{model}"
        figures.append(Figure(told, gain, Goal(">=", 2.66)))
    if selective and everything:
        share = certain(selective.hit_ratio / everything.hit_ratio, len(selective.samples))
        told = f"hit_ratio_selective_over_share_all{model}"
        figures.append(Figure(told, share, Goal(">=", 0.95)))
    if selective:
        share = certain(selective.scan_share, len(selective.samples))
        figures.append(Figure(f"scan_share{model}", share, None if model else Goal("<=", 0.02)))
    return figures


def asked(options: Options) -> tuple[list[str], list[Policy]]:
    """Return the parts and policies to measure: all, or those that `--only` names."""
    names = [policy.name for policy in POLICIES]
    unknown = sorted({*options.only} - {*PARTS, *names})
    if unknown:
        known = ", ".join((*PARTS, *names))
        raise ConfigError(f"only: there is no part {unknown[0]!r}; there are: {known}")
    wanted = QUICK_POLICIES if options.quick else names
    parts: list[str] = [part for part in PARTS if part in options.only]
    chosen = [name for name in wanted if name in options.only] or wanted
    everything = QUICK_PARTS if options.quick else PARTS
    return parts or [*everything], [policy for policy in POLICIES if policy.name in chosen]


def measure(options: Options) -> Report:
    """Play the trace and run the audits under every policy, or the parts that are asked for."""
    if options.peers:
        return sharing_peers.measure(options)
    parts, policies = asked(options)
    shape = sharing_trace.QUICK if options.quick else sharing_trace.FULL
    trace = sharing_trace.make(shape) if options.quick else sharing_trace.read()
    threads = ("--threads", str(options.threads))
    bench = Bench(trace, shape, Texts(TextModel.load(DEMO_MODEL), shape), options.quick, parts)
    played: dict[str, Replay] = {}
    figures: list[Figure] = []
    rows: list[Row] = []
    seen: dict[str, Estimate] = {}
    attacks: list[Row] = []
    for policy in policies:
        tried = bench.attempt(policy, threads)
        if tried.played is not None:
            played[policy.name] = tried.played
        attacks += attack_rows(OURS, policy.name, tried.reports)
        told = attack_figures(policy.name, tried.reports)
        if told:
            seen[policy.name] = told[0].estimate
        figures += told
        if tried.control is not None:
            figures += control_figures(policy.name, tried.control)
            attacks += attack_rows(OURS, f"{policy.name}, sent by k", [tried.control])
    rows += [policy_row(OURS, "demo", name, one, seen.get(name)) for name, one in played.items()]
    compared: list[Figure] = ratios(played, DEMO)
    if "shapes" in parts:
        shaped = at_shapes(trace, shape, LIKE, options.threads)
        compared += ratios(shaped)
        rows += [policy_row(OURS, LIKE, name, one, None) for name, one in shaped.items()]
    params: dict[str, Cell] = {
        "model": f"demo; shapes: random weights of {LIKE}" if "shapes" in parts else "demo",
        "threads": options.threads,
        "quick": options.quick,
        "parts": ", ".join(parts),
        **played_params(trace, shape),
    }
    return Report("sharing", params, [*compared, *figures], [*rows, *attacks])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("sharing", arguments, measure)
