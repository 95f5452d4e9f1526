"""From settings to a running engine, with what the operator sees on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from kvkeep.cli.console import NOTES, human_bytes, loading_bar
from kvkeep.config import Settings
from kvkeep.engine.api import EngineClient, ModelInfo
from kvkeep.engine.options import EngineOptions, KeyOptions, SharingOptions
from kvkeep.engine.process import spawn_engine
from kvkeep.engine.sealers import provider_of
from kvkeep.errors import ConfigError
from kvkeep.models.check import check_directory
from kvkeep.models.hub import resolve
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.opened import OpenedStore, opened, opened_by_worker
from kvkeep.shield.providers.provider import located, parse_spec
from kvkeep.shield.secret import forbid_dumps
from kvkeep.shield.workers import PROVIDER, cluster_of, stores_of

MODEL_SETTINGS = (
    "config",
    "model",
    "served_model_name",
    "allow_download",
    "dtype",
    "weights",
    "device",
    "kernel",
    "threads",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv",
    "kv_auto_tokens",
    "kv_auto_codec",
    "kv_auto_memory",
    "kv_window_tokens",
    "guard_share",
    "guard_samples",
    "guard_kl",
    "guard_memory",
    "guard_state",
    "kv_cache_memory_bytes",
    "evict",
    "evict_window",
    "evict_prompt_rows",
    "evict_recent",
    "evict_weight",
    "evict_most",
    "evict_spread",
    "evict_cap",
    "evict_observe_every",
    "shield",
    "shield_keys",
    "shield_store",
    "shield_dumps",
    "transform_key",
    "transform_epoch",
    "prefix_caching",
    "tier",
    "attention_planner",
    "attention_share_across_tenants",
    "attention_cost_model",
)
"""What concerns an engine without a server."""


def sharing_options(settings: Settings) -> SharingOptions:
    """Return how tenants share; votes are kept beside the keys unless told otherwise."""
    return SharingOptions(
        policy=settings.share,
        k=settings.share_k,
        eps=settings.share_eps,
        delta=settings.share_delta,
        epoch_s=settings.share_epoch_s,
        life_epochs=settings.share_life_epochs,
        units_per_day=settings.share_units_per_day,
        state=_text(settings.share_state or _beside_keys(settings, "votes")),
        pinned=_text(settings.share_pinned),
        rules=_text(settings.share_rules),
        classifier=_text(settings.share_classifier),
        gate=settings.share_gate,
        audit_log=_text(settings.share_audit_log),
        webhook=settings.share_webhook,
    )


def key_store(settings: Settings) -> Path:
    """Return the file of wrapped sealing keys: beside the API keys unless told otherwise."""
    return settings.shield_store or settings.keys.with_name(f"{settings.keys.name}.sealing")


def key_options(settings: Settings) -> KeyOptions:
    """Return whose keys seal pages, as every process of this user understands it."""
    named = settings.shield_keys
    return KeyOptions(
        provider=None if named is None else str(located(parse_spec(named))),
        store=str(key_store(settings)),
        dumps=settings.shield_dumps,
    )


@contextmanager
def opened_store(settings: Settings) -> Iterator[OpenedStore]:
    """Open the key store for its operator; raises `ConfigError` where there is none."""
    path = key_store(settings)
    there = path.exists()
    if not (there or stores_of(path)):
        raise ConfigError(f"shield_store: there is no {path}; name the one the server was given")
    forbid_dumps()
    options = key_options(settings)
    if not there or KeyStore(path).read().provider != PROVIDER:
        with opened(path, provider_of(options)) as store:
            yield store
        return
    leads, worker = cluster_of(path)  # a worker's, whose key comes from the cluster's
    if not leads.exists():
        raise ConfigError(f"shield_store: {path} is a worker's; it needs {leads}")
    options = msgspec.structs.replace(options, store=str(leads))
    with opened(leads, provider_of(options)) as store:
        key = store.worker_key(worker)
    with opened_by_worker(path, key) as store:
        yield store


def _beside_keys(settings: Settings, what: str) -> Path | None:
    """Return the file for something kept over restarts; None where there are no keys."""
    keys = settings.keys
    return None if settings.no_auth else keys.with_name(f"{keys.name}.{what}")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def engine_options(settings: Settings) -> EngineOptions:
    """Return what the engine is started with."""
    size = settings.kv_cache_memory_bytes
    memory = None if size is None else int(size)  # plain, so that it crosses to other processes
    return EngineOptions(
        model=settings.model,
        served_name=settings.served_model_name,
        dtype=settings.dtype,
        weights=settings.weights,
        kernel=settings.kernel,
        device=settings.device,
        threads=settings.threads,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv=settings.kv,
        kv_auto_tokens=settings.kv_auto_tokens,
        kv_auto_codec=settings.kv_auto_codec,
        kv_auto_memory=settings.kv_auto_memory,
        kv_window_tokens=settings.kv_window_tokens,
        guard_share=settings.guard_share,
        guard_samples=settings.guard_samples,
        guard_kl=settings.guard_kl,
        guard_memory=settings.guard_memory,
        guard_state=_text(settings.guard_state or _beside_keys(settings, "guard")),
        kv_cache_bytes=memory,
        evict=settings.evict,
        evict_window=settings.evict_window,
        evict_prompt_rows=settings.evict_prompt_rows,
        evict_recent=settings.evict_recent,
        evict_weight=settings.evict_weight,
        evict_most=settings.evict_most,
        evict_spread=settings.evict_spread,
        evict_cap=settings.evict_cap,
        evict_observe_every=settings.evict_observe_every,
        shield=settings.shield,
        keys=key_options(settings),
        transform_key=_text(settings.transform_key),
        transform_epoch=settings.transform_epoch,
        prefix_caching=settings.prefix_caching,
        attention_planner=settings.attention_planner,
        attention_share_across_tenants=settings.attention_share_across_tenants,
        attention_cost_model=_text(settings.attention_cost_model),
        share=sharing_options(settings),
        tiers=settings.tier,
        allow_download=settings.allow_download,
    )


def checkpoint_path(settings: Settings) -> Path:
    """Return the model's directory; raises `ModelError` before anything slow has begun.

    To be called before a tokenizer is imported or an engine is started: what is wrong with the
    files is known from their headers.
    """
    path = resolve(settings.model, allow_download=settings.allow_download)
    check_directory(path)
    return path


def describe(info: ModelInfo) -> str:
    """Return what is served, in a few lines."""
    rows = (
        ("model", f"{info.name} ({info.path})"),
        ("dtype", f"{info.dtype}, {info.num_layers} layers, {info.num_kv_heads} KV heads"),
        ("context", f"{info.max_model_len} tokens"),
        ("pages", f"{info.num_pages} of 64 tokens, {human_bytes(info.kv_bytes)}"),
        ("kv", _stored(info)),
        ("bytes per token", str(info.bytes_per_token)),
        ("evict", info.evict),
        ("shield", info.shield),
        ("kernel", info.kernel),
    )
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)


def _stored(info: ModelInfo) -> str:
    if info.window_tokens is None:
        return "as computed"
    staged = human_bytes(info.staged_bytes)
    if info.kept_bytes:
        kept = human_bytes(info.kept_bytes)
        return f"{info.kv}: short requests as computed ({kept}), long ones coded ({staged} staged)"
    return f"{info.kv}, the last {info.window_tokens} tokens or fewer as computed ({staged})"


@asynccontextmanager
async def running_engine(settings: Settings) -> AsyncIterator[tuple[EngineClient, ModelInfo]]:
    """Start an engine in its own process, wait until it is warm, and end it on the way out."""
    with loading_bar("loading") as report:
        client = spawn_engine(engine_options(settings), report)
        try:
            info = await client.info()
        except BaseException:
            await client.close()
            raise
    NOTES.print(describe(info))
    try:
        yield client, info
    finally:
        await client.close()
