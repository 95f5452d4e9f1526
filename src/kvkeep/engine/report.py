"""What an engine tells the admin port of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvkeep.cache.manager import CacheManager
from kvkeep.engine.api import EngineStats, FinishReason, TenantUse
from kvkeep.engine.runner import ModelRunner
from kvkeep.engine.scheduler import Scheduler
from kvkeep.engine.sharing import Sharing
from kvkeep.engine.stats import EngineCounters


class Sources(NamedTuple):
    """Who knows the figures."""

    manager: CacheManager
    scheduler: Scheduler
    runner: ModelRunner
    sharing: Sharing


def snapshot(
    of: Sources, c: EngineCounters, shares: Mapping[str, float], num_pages: int
) -> EngineStats:
    """Return all figures of one moment; `shares` are the tenants' parts of `num_pages`."""
    pool, read = of.manager.stats(), of.runner.read
    tenants = [_use(of, name, int(shares[name] * num_pages)) for name in sorted(shares)]
    return EngineStats(
        requests_running=sum(t.running for t in tenants),
        requests_waiting=sum(t.waiting for t in tenants),
        pages_total=num_pages,
        pages_used=num_pages - pool.pages_free,
        pages_free=pool.pages_free,
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
        encoded_pages_total=read.encoded_pages,
        finished=tuple((reason.value, c.finished[reason]) for reason in FinishReason),
        ttft_s=c.ttft.snapshot(),
        tpot_s=c.tpot.snapshot(),
        e2e_s=c.e2e.snapshot(),
        step_s=c.step.snapshot(),
        tenants=tuple(tenants),
        sharing=of.sharing.stats(of.manager.public_pages, c.saved_tokens),
    )


def _use(of: Sources, tenant: str, quota_pages: int) -> TenantUse:
    running, waiting = of.scheduler.counts(tenant)
    return TenantUse(
        tenant=tenant,
        quota_pages=quota_pages,
        used_pages=of.manager.used(tenant),
        running=running,
        waiting=waiting,
    )
