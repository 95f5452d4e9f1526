"""An engine with places below memory: hits that outlive it, and nothing but time that shows."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import pytest

from kvkeep.engine.api import Chunk, SamplingParams, TenantTerms
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, KeyOptions, SharingOptions
from kvkeep.eviction.policy import KeepAll
from kvkeep.models.text import TextModel
from kvkeep.quant.codec import Float
from kvkeep.sharing.promotion import Promotion
from kvkeep.shield.policy import NoShield
from tests.cache.tier.services import redis_server
from tests.e2e.test_composition import prompt_of
from tests.engine.test_sharing import TEMPLATE, ClearsAll, wait_for_scans
from tests.engines import core_for, drive, request, tokens

SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = [prompt_of(300 + 40 * seed, seed) for seed in range(4)]


@functools.cache
def bytes_per_token(model: Path) -> int:
    return core_for(model).info.bytes_per_token


def tiered(
    model: Path, tier: str, pages: int = 16, kv: str = "bf16", weights: str = "float"
) -> EngineCore:
    """Return an engine whose pool holds few pages."""
    page_bytes = 64 * bytes_per_token(model) if kv == "bf16" else 0
    return core_for(
        model,
        tenants={"a": 0.9},
        pages=pages,
        page_bytes=page_bytes,
        tiers=(tier,),
        kv=kv,
        weights=weights,
    )


def ask(core: EngineCore, prompt: list[int], tenant: str = "a") -> list[Chunk]:
    return drive(core, [request(prompt, SHORT, id="r", tenant=tenant)])["r"]


def hits(core: EngineCore) -> int:
    return sum(use.hits for use in core.stats().tiers)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_evicted_pages_come_back_from_a_tier(
    tiny: dict[str, Path], tmp_path: Path, where: str
) -> None:
    tier = "memory:64MiB" if where == "memory" else f"disk:{tmp_path},64MiB"
    core = tiered(tiny["qwen2"], tier)
    cold = [tokens(ask(core, prompt)) for prompt in PROMPTS]
    again = [ask(core, prompt) for prompt in PROMPTS]
    assert [tokens(chunks) for chunks in again] == cold
    cached = [chunks[0].cached_tokens for chunks in again]
    assert all(n >= len(p) // 64 * 64 for n, p in zip(cached, PROMPTS, strict=True))
    assert hits(core) > 0
    core.close()


@pytest.mark.parametrize("kv", ["bf16", "k4v2"])
def test_hits_outlive_a_restart(tiny: dict[str, Path], tmp_path: Path, kv: str) -> None:
    tier = f"disk:{tmp_path},64MiB"
    core = tiered(tiny["qwen2"], tier, kv=kv)
    cold = [tokens(ask(core, prompt)) for prompt in PROMPTS]
    core.close()
    core = tiered(tiny["qwen2"], tier, kv=kv)
    warm = [ask(core, prompt) for prompt in PROMPTS]
    whole = 64 if kv == "bf16" else 128
    assert [tokens(chunks) for chunks in warm] == cold
    assert [chunks[0].cached_tokens for chunks in warm] == [
        len(prompt) // whole * whole for prompt in PROMPTS
    ]
    core.close()
    other = tiered(tiny["qwen2"], tier, weights="int8")
    assert ask(other, PROMPTS[0])[0].cached_tokens == 0, "other weights compute other pages"
    other.close()


@pytest.mark.parametrize("beside", [(), ("memory:8MiB",), ("memory:8MiB", "disk:{},64MiB")])
def test_hits_outlive_a_restart_in_a_server(
    beside: tuple[str, ...], tiny: dict[str, Path], tmp_path: Path
) -> None:
    warm = []
    with redis_server(tmp_path) as port:
        for disk in ("lost", "new"):
            core = core_for(
                tiny["qwen2"],
                tenants={"a": 0.9},
                tiers=(
                    f"redis://127.0.0.1:{port}/1,64MiB",
                    *(tier.format(tmp_path / disk) for tier in beside),
                ),
                shield="seal",
                keys=KeyOptions(store=str(tmp_path / "keys.json")),
            )
            warm.append([ask(core, prompt) for prompt in PROMPTS])
            core.close()
    told = [[tokens(chunks) for chunks in found] for found in warm]
    assert told[0] == told[1]
    cached = [chunks[0].cached_tokens for chunks in warm[1]]
    assert cached == [len(prompt) // 64 * 64 for prompt in PROMPTS]


def test_pages_at_rest_are_written_before_anything_evicts_them(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    core = tiered(tiny["qwen2"], f"disk:{tmp_path},64MiB", pages=64)
    ask(core, PROMPTS[0])
    end = time.monotonic() + 10
    whole = 4 * 64 * core.info.bytes_per_token
    while sum(path.stat().st_size for path in tmp_path.glob("*.segment")) < whole:
        core.step()
        assert time.monotonic() < end
    assert core.caches.used("a") >= 4, "and they are still in memory"
    core.close()


def test_a_purged_or_removed_tenant_leaves_nothing(tiny: dict[str, Path], tmp_path: Path) -> None:
    tier = f"disk:{tmp_path},64MiB"
    core = tiered(tiny["qwen2"], tier)
    core.set_tenants({"a": 0.4, "b": 0.4})
    for tenant in ("a", "b"):
        ask(core, PROMPTS[0], tenant)
    core.caches.managers["float"].evict_pages("a", 99)
    assert core.purge("a").pages == len(PROMPTS[0]) // 64
    core.close()
    core = tiered(tiny["qwen2"], tier)
    core.set_tenants({"a": 0.4, "b": 0.4})
    assert ask(core, PROMPTS[0], "a")[0].cached_tokens == 0
    core.set_tenants({"a": 0.4})
    core.close()
    core = tiered(tiny["qwen2"], tier)
    core.set_tenants({"a": 0.4, "b": 0.4})
    assert ask(core, PROMPTS[0], "b")[0].cached_tokens == 0
    core.close()


@pytest.mark.parametrize(("store", "found"), [("never", 0), ("memory", 0), ("disk", 256)])
def test_a_tenants_terms_hold_below_memory(
    tiny: dict[str, Path], tmp_path: Path, store: str, found: int
) -> None:
    tier = f"disk:{tmp_path},64MiB"
    terms = {"a": TenantTerms(voter="a", store=store)}  # type: ignore[arg-type]
    for turn in range(2):
        core = tiered(tiny["qwen2"], tier)
        core.set_tenants({"a": 0.9}, terms)
        cached = ask(core, PROMPTS[0])[0].cached_tokens
        assert cached == (found if turn else 0)
        core.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_disk_costs_time_and_no_token(
    tiny: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    tier = f"disk:{tmp_path},64MiB"
    core = tiered(tiny["qwen2"], tier)
    cold = [tokens(ask(core, prompt)) for prompt in PROMPTS]
    core.close()
    draw = np.random.default_rng(seed)
    for path in tmp_path.glob("*.segment"):
        data = bytearray(path.read_bytes())
        for at in draw.integers(0, len(data), 6):
            data[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(data[: -int(draw.integers(1, 3000))])
    core = tiered(tiny["qwen2"], tier)
    warm = [ask(core, prompt) for prompt in PROMPTS]
    assert [tokens(chunks) for chunks in warm] == cold
    (use,) = core.stats().tiers
    assert sum(count for _, count in use.errors) > 0
    assert any(chunks[0].cached_tokens for chunks in warm), "what is whole is still found"
    core.close()


@pytest.mark.parametrize("state", [True, False])
def test_a_snapshot_outlives_a_restart_where_its_votes_do(
    tiny: dict[str, Path], tmp_path: Path, *, state: bool
) -> None:
    share = SharingOptions(
        policy="selective", k=2, state=str(tmp_path / "votes") if state else None
    )
    options = EngineOptions(
        model=str(tiny["qwen2"]),
        threads=2,
        kv_cache_bytes=16 << 20,
        share=share,
        tiers=(f"disk:{tmp_path / 'tier'},64MiB",),
        keys=KeyOptions(store=str(tmp_path / "keys.json")),
    )
    prompt, saved = TextModel.load(tiny["qwen2"]).encode(TEMPLATE)[:600], []
    for turn in range(2):
        core = build_core(
            options,
            parts=Parts(
                techniques=Techniques(Float(), NoShield(), KeepAll()), inspector=ClearsAll()
            ),
        )
        terms = {name: TenantTerms(voter=name, group="all") for name in "abcd"}
        core.set_tenants(dict.fromkeys("abcd", 0.15), terms)
        for name in "" if turn else "abc":
            ask(core, prompt, name)
        for epoch in range(2):
            assert isinstance(core.sharing.policy, Promotion)
            wait_for_scans(core.sharing.policy)
            core.end_epoch(60.0 * (2 * turn + epoch))
            until_quiet(core)
        before = core.counters.saved_tokens
        drive(core, [request(prompt, SHORT, id="d", tenant="d")])
        saved.append(core.counters.saved_tokens - before)
        core.purge("d")
        core.close()
    assert saved == [512, 512 if state else 0]


def until_quiet(core: EngineCore) -> None:
    """Wait until nothing moves below memory."""
    end = time.monotonic() + 10
    quiet = 0
    while quiet < 100:
        quiet = 0 if core.caches.pause_s(1.0, 0.0) < 1.0 else quiet + 1
        core.step()
        core.caches.poll()
        time.sleep(0.001)
        assert time.monotonic() < end
