"""What an engine tells the admin port of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvkeep.cache.caches import Caches
from kvkeep.engine.api import EngineStats, FinishReason, TenantUse
from kvkeep.engine.guard import Guard
from kvkeep.engine.led_guard import LedGuard
from kvkeep.engine.runner import ModelRunner
from kvkeep.engine.scheduler import Scheduler
from kvkeep.engine.sharing import Sharing
from kvkeep.engine.stats import EngineCounters


class Sources(NamedTuple):
    """Who knows the figures."""

    caches: Caches
    scheduler: Scheduler
    runner: ModelRunner
    sharing: Sharing
    guard: Guard | LedGuard
    max_tokens: int
    """Of a prompt."""


def snapshot(of: Sources, c: EngineCounters, shares: Mapping[str, float]) -> EngineStats:
    """Return all figures of one moment; `shares` are the tenants' parts of the pages."""
    caches, read, unused = of.caches, of.runner.read, of.caches.unused()
    tenants = [_use(of, name, caches.quota(shares[name]), unused[name]) for name in sorted(shares)]
    return EngineStats(
        requests_running=sum(t.running for t in tenants),
        requests_waiting=sum(t.waiting for t in tenants),
        pages_total=caches.num_pages,
        pages_used=caches.num_pages - caches.free_pages,
        pages_free=caches.free_pages,
        prompt_tokens_total=c.prompt_tokens,
        generation_tokens_total=c.generated_tokens,
        prefix_cache_queries_total=c.cache_queries,
        prefix_cache_hits_total=c.cache_hits,
        preemptions_total=of.scheduler.preemptions,
        steps_total=c.steps,
        attention_tree_steps_total=read.tree_steps,
        attention_planned_bytes_total=read.planned_bytes,
        attention_flat_bytes_total=read.flat_bytes,
        attention_read_bytes_total=of.runner.kernels.attention.bytes_read,
        kv_chosen=tuple(sorted(c.chosen.items())),
        encoded_pages_total=read.encoded_pages,
        evict=of.runner.evict_stats(of.scheduler.packs.given_up),
        finished=tuple((reason.value, c.finished[reason]) for reason in FinishReason),
        ttft_s=c.ttft.snapshot(),
        tpot_s=c.tpot.snapshot(),
        e2e_s=c.e2e.snapshot(),
        step_s=c.step.snapshot(),
        tenants=tuple(tenants),
        sharing=of.sharing.stats(caches.public_pages, c.saved_tokens, of.max_tokens),
        guard=of.guard.stats(),
        tiers=caches.tier_uses(),
    )


def _use(of: Sources, tenant: str, quota_pages: int, unused_pages: int) -> TenantUse:
    running, waiting = of.scheduler.counts(tenant)
    return TenantUse(
        tenant=tenant,
        quota_pages=quota_pages,
        used_pages=of.caches.used(tenant),
        unused_pages=unused_pages,
        running=running,
        waiting=waiting,
    )
