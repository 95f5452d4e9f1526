"""Shadows beside requests that lose tokens: a tenant whose answers suffer keeps everything."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from kvkeep.engine.api import Chunk, FinishReason, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.choosing import KEPT
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.probes import PASSAGE_TOKENS
from kvkeep.eviction.corm import Corm, CormOptions
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.shield.policy import NoShield
from kvkeep.types import Access, Layout
from tests.e2e.test_coded import bits, everything_is_given_back, prompt_of
from tests.e2e.test_guard import Exact, use_of
from tests.engines import core_for, drive, manager_of, request
from tests.toys import PromoteOffered

PARAMS = SamplingParams(max_tokens=8, temperature=0.8, seed=7, logprobs=2, ignore_eos=True)
SOUND = CormOptions(window=24, recent=16, weight=1e-9, birth="seen", decide_every=4)
FAULTY = CormOptions(window=4, recent=1, weight=1e3, sinks=0)


def guarded(
    model: Path, evictor: Evictor, codec: Codec | None = None, **options: object
) -> EngineCore:
    parts = Parts(techniques=Techniques(codec or Float(), NoShield(), evictor))
    settings = {"max_num_seqs": 8, "guard_samples": 2, "guard_share": 1.0, **options}
    return core_for(model, parts=parts, **settings)  # type: ignore[arg-type]


def conversation(core: EngineCore, count: int, tenant: str = "a") -> list[list[Chunk]]:
    asked = [request(prompt_of(200, i), PARAMS, tenant=tenant) for i in range(count)]
    return [drive(core, [one])["r"] for one in asked]


def test_an_evictor_that_forgets_nothing_is_no_different_from_its_shadow(
    tiny: dict[str, Path],
) -> None:
    core = guarded(tiny["qwen2"], Corm(SOUND))
    told = conversation(core, 6)
    use = use_of(core)
    assert use.shadowed == 6, "probes are nobody's requests"
    assert use.compared_tokens == use.agreed_tokens == 6 * (8 + PASSAGE_TOKENS)
    assert (use.kl_nats, use.forgotten_tokens, use.steps_back) == (0.0, 0, 0)
    assert core.stats().requests_running == 0
    alone = conversation(guarded(tiny["qwen2"], KeepAll(), guard_share=0.0), 6)
    assert [bits(one) for one in told] == [bits(one) for one in alone]
    everything_is_given_back(core)


def test_a_planted_fault_takes_its_tenant_back_to_keeping_everything(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    core = guarded(tiny["qwen2"], Corm(FAULTY), guard_kl=1e-6)
    with caplog.at_level(logging.WARNING):
        told = conversation(core, 6)
    assert "guard: tenant a steps back, step 1 of 1" in caplog.text
    assert use_of(core).steps_back == 1
    whole = conversation(guarded(tiny["qwen2"], KeepAll(), guard_share=0.0), 6)
    same = [bits(ours) == bits(theirs) for ours, theirs in zip(told, whole, strict=True)]
    assert same == [False] * 4 + [True] * 2, "an epoch has two samples, the next one waits"
    drive(core, [request(prompt_of(200), PARAMS, tenant="b")])
    assert use_of(core, "b").steps_back == 0, "another tenant has to find out for itself"
    everything_is_given_back(core)


def test_where_pages_are_coded_too_eviction_ends_first(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Corm(FAULTY), Hack(Layout.K2V2), guard_kl=1e-9)
    told = conversation(core, 10)
    assert use_of(core).steps_back == 2
    forms = dict(core.stats().kv_chosen)
    assert forms[KEPT] == 2, "probes beside them are nobody's requests"
    coded = guarded(tiny["qwen2"], KeepAll(), Hack(Layout.K2V2), guard_share=0.0)
    masked = [bits(a) == bits(b) for a, b in zip(told, conversation(coded, 10), strict=True)]
    assert masked == [False] * 4 + [True] * 4 + [False] * 2


def test_a_codec_that_loses_nothing_and_an_evictor_that_forgets_nothing(
    tiny: dict[str, Path],
) -> None:
    core = guarded(tiny["qwen2"], Corm(SOUND), Exact(), chunk_tokens=48)
    several = SamplingParams(max_tokens=20, n=2, seed=3, temperature=0.9, ignore_eos=True)
    drive(core, [request(prompt_of(150 + 40 * i, i), several, id=str(i)) for i in range(3)])
    use = use_of(core)
    assert use.compared_tokens == use.agreed_tokens == 3 * (20 + PASSAGE_TOKENS)
    assert use.kl_nats == 0.0
    everything_is_given_back(core)


class Hears(PromoteOffered):
    """Notes what it hears of prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Access] = []

    def observe(self, access: Access) -> None:
        self.heard.append(access)


def test_a_probe_counts_nowhere_but_with_the_guard(tiny: dict[str, Path]) -> None:
    """Its tenant's figures, and what the sharing policy's monitor hears, are those without it."""
    figures, heard, compared = [], [], 0
    for share in (0.0, 1.0):
        policy = Hears()
        parts = Parts(techniques=Techniques(Float(), NoShield(), Corm(SOUND)), policy=policy)
        core = core_for(tiny["qwen2"], parts=parts, max_num_seqs=8, guard_share=share)
        conversation(core, 3)
        stats = core.stats()
        evict = msgspec.structs.replace(stats.evict, packed_views_total=0, freed_bytes_total=0)
        figures.append(
            (
                stats.prompt_tokens_total,
                stats.generation_tokens_total,
                stats.prefix_cache_queries_total,
                stats.prefix_cache_hits_total,
                stats.finished,
                [times.counts[-1] for times in (stats.ttft_s, stats.tpot_s, stats.e2e_s)],
                sum(count for _, count in stats.kv_chosen),
                evict,
            )
        )
        heard.append(policy.heard)
        compared = sum(use.compared_tokens for use in stats.guard)
    assert compared == 3 * (8 + PASSAGE_TOKENS), "there were probes"
    assert figures[0] == figures[1]
    assert heard[0] == heard[1]
    assert [access.at for access in heard[1] if access.tenant == "a"] == [0, 1, 2]


def test_a_probe_ends_with_the_request_that_is_cancelled(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Corm(SOUND))
    core.submit(request(prompt_of(200, 0), PARAMS))
    core.step()
    assert core.stats().requests_running + core.stats().requests_waiting == 2
    core.cancel("r")
    assert [said.chunk.finish for said in core.step()] == [FinishReason.CANCELLED]
    assert core.idle()
    everything_is_given_back(core)


def test_a_prompt_without_room_for_its_shadow_keeps_nothing_of_what_is_public(
    tiny: dict[str, Path],
) -> None:
    """It waits; a snapshot's pages that it would have read do not become its tenant's own."""
    techniques = Techniques(Float(), NoShield(), Corm(SOUND))
    page_bytes = guarded(tiny["qwen2"], KeepAll(), guard_share=0.0).info.bytes_per_token * 64
    core = core_for(
        tiny["qwen2"],
        parts=Parts(techniques=techniques, policy=PromoteOffered()),
        pages=20,
        page_bytes=page_bytes,
        max_num_seqs=8,
        guard_samples=8,
        guard_share=1.0,
    )
    drive(core, [request(prompt_of(200, 0), PARAMS)])
    core.end_epoch(0.0)
    long = msgspec.structs.replace(PARAMS, max_tokens=60)
    core.submit(request(prompt_of(70, 1), long, id="first", tenant="b"))
    core.step()
    core.submit(request(prompt_of(200, 0), PARAMS, id="second", tenant="b"))
    core.step()
    (use,) = [one for one in core.stats().tenants if one.tenant == "b"]
    assert (use.running, use.waiting) == (1, 2), "the second one and its probe wait"
    assert manager_of(core).room("b") == 5, "room for its view of 4, or for its shadow"
    assert use.unused_pages == 0
    core.close()
