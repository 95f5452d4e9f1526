"""Figures of several engines as those of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from kvkeep.cache.tiers import TierUse
from kvkeep.engine.api import (
    EngineStats,
    EvictStats,
    Histogram,
    SharingStats,
    TenantUse,
    WorkerUse,
)

_COUNTS: Final = (
    "requests_running",
    "requests_waiting",
    "pages_total",
    "pages_used",
    "pages_free",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "preemptions_total",
    "steps_total",
    "attention_tree_steps_total",
    "attention_planned_bytes_total",
    "attention_flat_bytes_total",
    "attention_read_bytes_total",
    "encoded_pages_total",
)
_FOUND: Final = ("prefix_cache_queries_total", "prefix_cache_hits_total", "encoded_pages_total")
_TIER_COUNTS: Final = ("limit_bytes", "used_bytes", "pages", "hits", "misses", "renewed")
_TIMES: Final = ("ttft_s", "tpot_s", "e2e_s", "step_s")
_SHARED: Final = (
    "public_pages",
    "scan_restarts",
    "scan_s",
    "saved_tokens",
    "alerts_failed",
)
_NO_TIMES: Final = Histogram(bounds=(), counts=(0,), total=0.0)
_COUNTED: Final = ("scanned_bytes", "scans_dropped", "scans_doubtful")
NOTHING: Final = msgspec.convert(
    {
        **dict.fromkeys(_COUNTS, 0),
        **dict.fromkeys(_TIMES, _NO_TIMES),
        "finished": (),
        "tenants": (),
        "sharing": SharingStats(policy="isolate"),
    },
    EngineStats,
)
"""What no engine says of itself."""


def total(
    of: Sequence[EngineStats], workers: tuple[WorkerUse, ...], *, agreed: bool = False
) -> EngineStats:
    """Return the sum of what engines say of themselves: led ones nothing of guards.

    `agreed`: their votes are counted as one.
    """
    if not of:
        return msgspec.structs.replace(NOTHING, workers=workers)
    return msgspec.structs.replace(
        of[0],
        **_sums(of, _COUNTS),
        **{name: _histogram([getattr(one, name) for one in of]) for name in _TIMES},
        kv_chosen=_counted(one.kv_chosen for one in of),
        finished=_counted(one.finished for one in of),
        evict=EvictStats(**_sums([one.evict for one in of], EvictStats.__struct_fields__)),
        tenants=_tenants(use for one in of for use in one.tenants),
        sharing=_sharing([one.sharing for one in of], agreed=agreed),
        tiers=_tiers([use for one in of for use in one.tiers]),
        workers=workers,
    )


def with_prompts(told: EngineStats, prefill: Sequence[EngineStats]) -> EngineStats:
    """Return the figures of those who answer with what prefill workers found, coded and saw.

    Who computes a prompt counts what it found, and nobody else does.
    """
    of = (told, *prefill)
    return msgspec.structs.replace(
        told,
        **_sums(of, _FOUND),
        kv_chosen=_counted(one.kv_chosen for one in of),
        sharing=msgspec.structs.replace(
            told.sharing,
            **_sums([one.sharing for one in of], ("saved_tokens", "alerts_failed")),
            alerts=_alerts([one.sharing for one in of]),
        ),
    )


def _alerts(of: Sequence[SharingStats]) -> tuple[tuple[str, str, int], ...]:
    alerts: Counter[tuple[str, str]] = Counter()
    for rule, action, count in (alert for one in of for alert in one.alerts):
        alerts[rule, action] += count
    return tuple((rule, action, count) for (rule, action), count in alerts.items())


def _sums(of: Sequence[Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: sum(getattr(one, name) for one in of) for name in names}


def _counted(of: Iterable[tuple[tuple[str, int], ...]]) -> tuple[tuple[str, int], ...]:
    counts: Counter[str] = Counter()
    for pairs in of:
        counts.update(dict(pairs))
    return tuple(counts.items())


def _histogram(of: Sequence[Histogram]) -> Histogram:
    """Return the sum of histograms, all of whose bounds are those of one build."""
    counts = tuple(sum(column) for column in zip(*(one.counts for one in of), strict=True))
    return Histogram(bounds=of[0].bounds, counts=counts, total=sum(one.total for one in of))


def _tenants(uses: Iterable[TenantUse]) -> tuple[TenantUse, ...]:
    by_name: dict[str, list[TenantUse]] = {}
    for use in uses:
        by_name.setdefault(use.tenant, []).append(use)
    names = [name for name in TenantUse.__struct_fields__ if name != "tenant"]
    return tuple(TenantUse(tenant=name, **_sums(own, names)) for name, own in by_name.items())


def _tiers(uses: Sequence[TierUse]) -> tuple[TierUse, ...]:
    """Return each kind's sum, with the room of the fullest disk and the keys that stand worst."""
    found = []
    for name in dict.fromkeys(use.tier for use in uses):
        own = [use for use in uses if use.tier == name]
        rooms = [use.room for use in own if use.room is not None]
        keys = [use.keys for use in own if use.keys is not None]
        counts = {key: sum(getattr(use, key) for use in own) for key in _TIER_COUNTS}
        found.append(
            TierUse(
                name,
                **counts,
                drops=_counted(use.drops for use in own),
                errors=_counted(use.errors for use in own),
                room=min(
                    rooms, key=lambda room: (not room.read_only, room.free_bytes), default=None
                ),
                keys=min(keys, key=lambda state: (state.running, state.answering), default=None),
            )
        )
    return tuple(found)


def _sharing(of: Sequence[SharingStats], *, agreed: bool) -> SharingStats:
    """Return the sum; what a tenant's votes may cost it is spent on each engine that counts."""
    eps = [one.eps_per_day for one in of if one.eps_per_day is not None]
    return msgspec.structs.replace(
        of[0],
        **_sums(of, _SHARED),
        **{name: _counted(getattr(one, name) for one in of) for name in _COUNTED},
        epoch=max(one.epoch for one in of),
        public_units=(max if agreed else sum)(one.public_units for one in of),
        eps_per_day=(max if agreed else sum)(eps) if eps else None,
        gate_bits=max(one.gate_bits for one in of),
        alerts=_alerts(of),
    )
