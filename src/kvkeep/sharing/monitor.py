"""Watches tenants, never pages: one that probes loses what others share, and nobody else does."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvkeep.sharing.audit import Alert, AlertSink, NoSink
from kvkeep.types import Access

NOTIFY = "notify"
FALL_BACK = "fall back"


@dataclass(frozen=True, slots=True)
class MonitorLimits:
    """What an honest tenant stays below."""

    novel_hits_per_hour: int = 200
    """Prompts that hit public content this tenant had not hit before."""
    branches: int = 8
    """Different continuations of one public prefix within `branch_s`, with tiny answers."""
    branch_s: float = 10.0
    tiny_tokens: int = 1
    probe_share: float = 0.5
    """Of its latest `probe_prompts` prompts: those with tiny answers that hit public content."""
    probe_prompts: int = 40
    fall_back_s: float = 3600.0


@dataclass(slots=True)
class _Watch:
    """What is remembered of one tenant."""

    seen: set[bytes] = field(default_factory=set)
    novel: deque[float] = field(default_factory=deque)
    branches: dict[bytes, dict[bytes, float]] = field(default_factory=dict)
    probes: deque[bool] = field(default_factory=deque)
    warned_at: float = -math.inf
    alone_until: float = -math.inf


class Monitor:
    """Warns of a tenant first; the second time within an hour it falls back to its own scope."""

    def __init__(
        self,
        limits: MonitorLimits | None = None,
        sink: AlertSink | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits or MonitorLimits()
        self._sink = sink or NoSink()
        self._clock = clock
        self._tenants: dict[str, _Watch] = {}
        self._diversity = Diversity()
        self.alerts: Counter[tuple[str, str]] = Counter()
        """By rule and action."""

    def observe(self, access: Access, tenant: str) -> None:
        """Look at one prompt of a tenant."""
        now, limits = self._clock(), self._limits
        watch = self._tenants.setdefault(tenant, _Watch())
        tiny = access.answer_tokens is not None and access.answer_tokens <= limits.tiny_tokens
        watch.probes.append(tiny and bool(access.public_chain))
        if len(watch.probes) >= limits.probe_prompts:
            share = sum(watch.probes) / len(watch.probes)
            watch.probes.popleft()
            if share > limits.probe_share:
                watch.probes.clear()
                self._act(tenant, watch, "probe share", share, limits.probe_share, now)
        if tiny and access.node:
            self._branch(tenant, watch, access.node, access.branch, now)
        if access.public_chain:
            last = access.public_chain[-1]
            self._novel(tenant, watch, last, now)
            for reused in self._diversity.observe(last, tenant, now):
                self._tell(reused.tenant, reused.rule, NOTIFY, reused.value, reused.limit, now)

    def falls_back(self, tenant: str) -> bool:
        """Tell whether a tenant reads nothing but its own for now."""
        watch = self._tenants.get(tenant)
        return watch is not None and self._clock() < watch.alone_until

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant's prompts; a fall-back goes on."""
        watch = self._tenants.pop(tenant, None)
        if watch is not None:
            self._tenants[tenant] = _Watch(warned_at=watch.warned_at, alone_until=watch.alone_until)

    def _novel(self, tenant: str, watch: _Watch, last: bytes, now: float) -> None:
        while watch.novel and watch.novel[0] <= now - 3600:
            watch.novel.popleft()
        if last in watch.seen:
            return
        watch.seen.add(last)
        watch.novel.append(now)
        if len(watch.novel) > self._limits.novel_hits_per_hour:
            count = len(watch.novel)
            watch.novel.clear()
            watch.seen.clear()
            limit = self._limits.novel_hits_per_hour
            self._act(tenant, watch, "novel public hits", count, limit, now)

    def _branch(self, tenant: str, watch: _Watch, node: bytes, branch: bytes, now: float) -> None:
        since = now - self._limits.branch_s
        watch.branches.setdefault(node, {})[branch] = now
        for known, times in list(watch.branches.items()):
            fresh = {b: at for b, at in times.items() if at > since}
            if fresh:
                watch.branches[known] = fresh
            else:
                del watch.branches[known]
        count = len(watch.branches[node])
        if count > self._limits.branches:
            watch.branches.clear()
            self._act(tenant, watch, "branch fan-out", count, self._limits.branches, now)

    def _act(
        self, tenant: str, watch: _Watch, rule: str, value: float, limit: float, now: float
    ) -> None:
        again = now - watch.warned_at <= self._limits.fall_back_s
        watch.warned_at = now
        if again:
            watch.alone_until = now + self._limits.fall_back_s
        self._tell(tenant, rule, FALL_BACK if again else NOTIFY, value, limit, now)

    def _tell(
        self, tenant: str, rule: str, action: str, value: float, limit: float, now: float
    ) -> None:
        self.alerts[rule, action] += 1
        self._sink.send(Alert(now, tenant, rule, action, value, limit))


@dataclass(frozen=True, slots=True)
class LowDiversity:
    """A public page that few tenants hit often; for the operator's eyes, nothing follows."""

    rule: str
    tenant: str
    """Who hit it most."""
    value: float
    limit: float


class Diversity:
    """SafeKV's two signals over windows of 10 s, kept as alerts alone.

    Reuse diversity is users over hits; entropy is that of hits over users, divided by its most.
    """

    window_s = 10.0
    low = 0.1
    growth = 10

    def __init__(self) -> None:
        self._hits: dict[bytes, Counter[str]] = {}
        self._before: dict[bytes, int] = {}
        self._until = -math.inf

    def observe(self, page: bytes, tenant: str, now: float) -> list[LowDiversity]:
        """Count a hit; return what the window before showed, where it has ended."""
        found: list[LowDiversity] = []
        if now >= self._until:
            found = [finding for page in self._hits for finding in self._judge(page)]
            self._before = {page: hits.total() for page, hits in self._hits.items()}
            self._hits = {}
            self._until = now + self.window_s
        self._hits.setdefault(page, Counter())[tenant] += 1
        return found

    def _judge(self, page: bytes) -> list[LowDiversity]:
        hits = self._hits[page]
        if hits.total() <= self.growth * max(self._before.get(page, 0), 1):
            return []
        most = hits.most_common(1)[0][0]
        values = (("reuse diversity", reuse_diversity(hits)), ("entropy", spread(hits)))
        return [LowDiversity(rule, most, v, self.low) for rule, v in values if v < self.low]


def reuse_diversity(hits: Counter[str]) -> float:
    """Return users over hits."""
    return len(hits) / hits.total()


def spread(hits: Counter[str]) -> float:
    """Return the entropy of hits over users as a part of the most it can be."""
    total = hits.total()
    entropy = -sum(n / total * math.log(n / total) for n in hits.values())
    return entropy / math.log(max(2, len(hits)))
