"""Renders the engine's figures and the server's counters in Prometheus' text format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from kvkeep import metrics as m
from kvkeep.cache.tiers import TierUse
from kvkeep.engine.api import EngineStats, Histogram, SharingStats
from kvkeep.engine.guarded import GuardUse
from kvkeep.server.frontend import Frontend, Health

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Sample = tuple[tuple[str, ...], float]

_SERVER_COUNTERS = (
    m.HTTP_REQUESTS,
    m.IGNORED_FIELDS,
    m.AUTH_FAILURES,
    m.DISCONNECTS,
    m.REVOKED,
    m.RELOADS,
    m.RELOAD_FAILURES,
)


def render(front: Frontend, stats: EngineStats | None) -> bytes:
    """Return the page; without `stats` it has the server's own part only."""
    families = list(_server(front))
    if stats is not None:
        name = front.model.name if front.model else ""
        families += [*_engine(stats, name), *_sharing(stats.sharing, name)]
        if front.model is not None:
            stored = (front.model.kv, str(front.model.window_tokens or 0))
            families.append(_simple(m.CACHE_INFO, [(stored, 1.0)], name))
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def spelled(number: float) -> float | str:
    """Return a number as it is, and infinity as Prometheus writes it."""
    return "+Inf" if number == math.inf else number


class _Families(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        """Return what was rendered for this one page."""
        return self._families


def _server(front: Frontend) -> Iterator[Family]:
    yield _simple(m.ENGINE_UP, [((), float(front.health in (Health.OK, Health.DRAINING)))])
    yield _simple(m.HTTP_IN_FLIGHT, [((), float(len(front.running)))])
    for metric in _SERVER_COUNTERS:
        samples = [
            (labels, float(n)) for (counted, labels), n in front.counts.items() if counted is metric
        ]
        yield _simple(metric, samples or ([] if metric.labels else [((), 0.0)]))


def _engine(stats: EngineStats, model: str) -> Iterator[Family]:
    used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    plain = (
        (m.REQUESTS_RUNNING, stats.requests_running),
        (m.REQUESTS_WAITING, stats.requests_waiting),
        (m.CACHE_USAGE, used),
        (m.PAGES_TOTAL, stats.pages_total),
        (m.PAGES_USED, stats.pages_used),
        (m.PAGES_FREE, stats.pages_free),
        (m.PROMPT_TOKENS, stats.prompt_tokens_total),
        (m.GENERATION_TOKENS, stats.generation_tokens_total),
        (m.PREFIX_QUERIES, stats.prefix_cache_queries_total),
        (m.PREFIX_HITS, stats.prefix_cache_hits_total),
        (m.PREEMPTIONS, stats.preemptions_total),
        (m.STEPS, stats.steps_total),
        (m.TREE_STEPS, stats.attention_tree_steps_total),
        (m.PLANNED_BYTES, stats.attention_planned_bytes_total),
        (m.FLAT_BYTES, stats.attention_flat_bytes_total),
        (m.READ_BYTES, stats.attention_read_bytes_total),
        (m.ENCODED_PAGES, stats.encoded_pages_total),
        (m.EVICT_SEEN, stats.evict.seen_tokens_total),
        (m.EVICT_LIVE, stats.evict.live_tokens_total),
        (m.EVICT_PROMPT, stats.evict.prompt_tokens_total),
        (m.EVICT_KEPT, stats.evict.prompt_kept_tokens_total),
        (m.EVICT_PACKED, stats.evict.packed_views_total),
        (m.EVICT_FREED, stats.evict.freed_bytes_total),
        (m.EVICT_MASKED, stats.evict.masked_only_total),
    )
    for metric, value in plain:
        yield _simple(metric, [((), float(value))], model)
    yield _simple(m.KV_CHOSEN, [((kv,), float(n)) for kv, n in stats.kv_chosen], model)
    yield _simple(m.FINISHED, [((reason,), float(n)) for reason, n in stats.finished], model)
    for metric, histogram in (
        (m.TTFT, stats.ttft_s),
        (m.TPOT, stats.tpot_s),
        (m.E2E, stats.e2e_s),
        (m.STEP_TIME, stats.step_s),
    ):
        yield _histogram(metric, histogram, model)
    for metric, values in (
        (m.TENANT_QUOTA, [(u.tenant, u.quota_pages) for u in stats.tenants]),
        (m.TENANT_USED, [(u.tenant, u.used_pages) for u in stats.tenants]),
        (m.TENANT_RUNNING, [(u.tenant, u.running) for u in stats.tenants]),
        (m.TENANT_WAITING, [(u.tenant, u.waiting) for u in stats.tenants]),
    ):
        yield _simple(metric, [((tenant,), float(value)) for tenant, value in values], model)
    yield from _guard(stats.guard, model)
    yield from _tiers(stats.tiers, model)


def _tiers(uses: tuple[TierUse, ...], model: str) -> Iterator[Family]:
    for metric, values in (
        (m.TIER_LIMIT, [(u.tier, u.limit_bytes) for u in uses]),
        (m.TIER_BYTES, [(u.tier, u.used_bytes) for u in uses]),
        (m.TIER_PAGES, [(u.tier, u.pages) for u in uses]),
        (m.TIER_HITS, [(u.tier, u.hits) for u in uses]),
        (m.TIER_MISSES, [(u.tier, u.misses) for u in uses]),
        (m.TIER_KEYS, [(u.tier, u.keys.answering) for u in uses if u.keys is not None]),
        (m.TIER_FREE, [(u.tier, u.room.free_bytes) for u in uses if u.room is not None]),
        (m.TIER_RENEWED, [(u.tier, u.renewed) for u in uses]),
        (m.TIER_DROPS, [drop for u in uses for drop in u.drops]),
        (m.TIER_ERRORS, [error for u in uses for error in u.errors]),
    ):
        yield _simple(metric, [((label,), float(value)) for label, value in values], model)


def _guard(uses: tuple[GuardUse, ...], model: str) -> Iterator[Family]:
    for metric, values in (
        (m.GUARD_SHADOWED, [(u.tenant, u.shadowed) for u in uses]),
        (m.GUARD_UNSHADOWED, [(u.tenant, u.unshadowed) for u in uses]),
        (m.GUARD_COMPARED, [(u.tenant, u.compared_tokens) for u in uses]),
        (m.GUARD_AGREED, [(u.tenant, u.agreed_tokens) for u in uses]),
        (m.GUARD_KL, [(u.tenant, u.kl_nats) for u in uses]),
        (m.GUARD_RECALLED, [(u.tenant, u.recalled_tokens) for u in uses]),
        (m.GUARD_FORGOTTEN, [(u.tenant, u.forgotten_tokens) for u in uses]),
        (m.GUARD_BACK, [(u.tenant, u.steps_back) for u in uses]),
    ):
        yield _simple(metric, [((tenant,), float(value)) for tenant, value in values], model)


def _sharing(stats: SharingStats, model: str) -> Iterator[Family]:
    yield _simple(m.SHARING_EPOCH, [((stats.policy,), float(stats.epoch))], model)
    plain = (
        (m.PUBLIC_UNITS, stats.public_units),
        (m.PUBLIC_PAGES, stats.public_pages),
        (m.SAVED_TOKENS, stats.saved_tokens),
        (m.SCAN_RESTARTS, stats.scan_restarts),
        (m.SCAN_SECONDS, stats.scan_s),
        (m.GATE_BITS, stats.gate_bits),
        (m.ALERTS_FAILED, stats.alerts_failed),
    )
    for metric, value in plain:
        yield _simple(metric, [((), float(value))], model)
    if stats.eps_per_day is not None:
        yield _simple(m.EPS_PER_DAY, [((), stats.eps_per_day)], model)
    for metric, counts in (
        (m.SCANNED_BYTES, stats.scanned_bytes),
        (m.SCANS_DROPPED, stats.scans_dropped),
        (m.SCANS_DOUBTFUL, stats.scans_doubtful),
    ):
        yield _simple(metric, [((tenant,), float(n)) for tenant, n in counts], model)
    yield _simple(m.ALERTS, [((rule, act), float(n)) for rule, act, n in stats.alerts], model)


def _simple(metric: m.Metric, samples: Iterable[Sample], model: str | None = None) -> Family:
    names, values = _model_label(model)
    kind = CounterMetricFamily if metric.kind is m.Kind.COUNTER else GaugeMetricFamily
    family = kind(metric.full_name, metric.help, labels=[*names, *metric.labels])
    for labels, value in samples:
        family.add_metric([*values, *labels], value)
    return family


def _histogram(metric: m.Metric, histogram: Histogram, model: str) -> Family:
    names, values = _model_label(model)
    family = HistogramMetricFamily(metric.full_name, metric.help, labels=names)
    bounds = [str(spelled(bound)) for bound in histogram.bounds]
    family.add_metric(
        values, list(zip(bounds, map(float, histogram.counts), strict=True)), histogram.total
    )
    return family


def _model_label(model: str | None) -> tuple[list[str], list[str]]:
    return ([], []) if model is None else (["model_name"], [model])
