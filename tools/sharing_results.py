"""What the files of `bench/results/sharing*.json` say together: each policy's cost and leak.

A policy's replay and its audit may stand in different files, of different commits. Of two files
that have the same, the later one counts. Replays of other models than the demo model don't. Files
of several machines and quick runs are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

ORDER: Final = (
    "isolate",
    "selective",
    "dp",
    "pinned",
    "salt",
    "safekv",
    "share_all",
    "vllm",
    "vllm_salted",
)
OURS: Final = "kvkeep"
MODEL: Final = "demo"
AUC: Final = re.compile(r"attack_auc_private_(?P<policy>\w+?)(?P<other>_halfwidth|_holds_chance)?")


class MixedResultsError(ValueError):
    """Result files that can't stand in one table."""


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """Where and when something was measured."""

    date: str
    commit: str
    machine: str

    @property
    def label(self) -> str:
        """Return the commit in short, whether files differed from it, and the day."""
        whole, _, dirty = self.commit.partition("-")
        return f"commit {whole[:8]}{' and changes' if dirty else ''}, {self.date[:10]}"


class Cost(NamedTuple):
    """What the replay of the trace took."""

    engine: str
    ttft_ms: float
    tokens_per_s: float
    hit_ratio: float
    source: Source


class Leak(NamedTuple):
    """What the worst channel of the audits showed."""

    auc: float
    low: float
    high: float
    source: Source

    @property
    def halfwidth(self) -> float:
        """Return half of the interval."""
        return (self.high - self.low) / 2


class Policy(NamedTuple):
    """What is known of one policy; None is what was not measured."""

    name: str
    cost: Cost | None
    leak: Leak | None


def read(paths: Sequence[Path]) -> list[Policy]:
    """Return the policies that any file tells of; raises `MixedResultsError`."""
    documents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    sources = {name: source_of(name, document) for name, document in documents.items()}
    machines = {source.machine: name for name, source in sources.items()}
    if len(machines) > 1:
        named = ", ".join(f"{name} ({machine})" for machine, name in sorted(machines.items()))
        raise MixedResultsError(f"results of several machines: {named}; give the files of one")
    costs: dict[str, Cost] = {}
    leaks: dict[str, Leak] = {}
    for name in sorted(documents, key=lambda name: sources[name]):
        for row in documents[name]["rows"]:
            costs |= cost_of(row, sources[name])
            leaks |= leak_of(row, sources[name])
    known = {*costs, *leaks}
    ordered = [*(name for name in ORDER if name in known), *sorted(known - {*ORDER})]
    return [Policy(name, costs.get(name), leaks.get(name)) for name in ordered]


def source_of(name: str, document: Mapping[str, Any]) -> Source:
    """Return where a file's figures come from; raises `MixedResultsError` for a quick run."""
    meta = document["meta"]
    if meta["params"].get("quick"):
        raise MixedResultsError(f"{name}: a quick run is no record; run it without --quick")
    told = meta["machine"]
    machine = f"{told['cpu']}, {told['cores']} cores{', ' + told['isa'] if 'isa' in told else ''}"
    return Source(meta["date"], meta["commit"], machine)


def cost_of(row: Mapping[str, Any], source: Source) -> dict[str, Cost]:
    """Return the cost that a row tells of, by policy."""
    if row.get("ttft_median_ms") is None or row.get("model", MODEL) != MODEL:
        return {}
    cost = Cost(
        engine=str(row["engine"]),
        ttft_ms=float(row["ttft_median_ms"]),
        tokens_per_s=float(row["tokens_per_s"]),
        hit_ratio=float(row["hit_ratio"]),
        source=source,
    )
    return {str(row["policy"]): cost}


def leak_of(row: Mapping[str, Any], source: Source) -> dict[str, Leak]:
    """Return the attack that a row tells of, by policy."""
    found = AUC.fullmatch(str(row.get("figure")))
    if found is None or found["other"]:
        return {}
    leak = Leak(float(row["median"]), float(row["low"]), float(row["high"]), source)
    return {found["policy"]: leak}


def provenance(policies: Sequence[Policy]) -> list[str]:
    """Return lines that say which commit each cost and each leak is of."""
    costs = [(p.cost.source, p.name) for p in policies if p.cost]
    leaks = [(p.leak.source, p.name) for p in policies if p.leak]
    lines = [
        f"{what}: {label} ({', '.join(names)})"
        for what, found in (("replay", costs), ("audit", leaks))
        for label, names in _by_commit(found)
    ]
    return lines + sorted({f"machine: {source.machine}" for source, _ in (*costs, *leaks)})


def _by_commit(found: Sequence[tuple[Source, str]]) -> list[tuple[str, list[str]]]:
    names: dict[str, list[str]] = {}
    for source, name in found:
        names.setdefault(source.label, []).append(name)
    return [*names.items()]
