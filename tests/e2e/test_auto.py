"""`kv = auto`: short requests as they were computed, long ones coded, in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.engine.api import SamplingParams, TenantTerms
from kvkeep.engine.build import Parts, build_core, default_parts
from kvkeep.engine.choosing import KEPT
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.errors import ConfigError
from kvkeep.sharing.policy import ShareAll
from tests.e2e.test_coded import PARAMS, bits, everything_is_given_back, prompt_of
from tests.engines import drive, request
from tests.forests import eager

BOUND = 200


def auto_core(
    model: Path, *, shared: bool = False, terms: dict[str, TenantTerms] | None = None
) -> EngineCore:
    options = EngineOptions(
        model=str(model),
        threads=2,
        chunk_tokens=48,
        max_num_seqs=16,
        kv_cache_bytes=32 << 20,
        kv="auto",
        kv_auto_tokens=BOUND,
        kv_auto_codec="k2v2",
    )
    techniques = default_parts(options).techniques
    parts = Parts(techniques=techniques, planner=eager(2), policy=ShareAll() if shared else None)
    core = build_core(options, parts=parts)
    core.set_tenants({"a": 0.4, "b": 0.4}, terms)
    return core


LENGTHS = (60, 190, 194, 195, 300, 400)
"""With six tokens of answer, the fourth is the first to be coded."""


def test_short_and_long_requests_say_in_one_step_what_they_say_alone(tiny: dict[str, Path]) -> None:
    asked = {n: request(prompt_of(n, 3), PARAMS, id=str(n), tenant="ab"[n % 2]) for n in LENGTHS}
    alone = {n: bits(drive(auto_core(tiny["qwen2"]), [one])[str(n)]) for n, one in asked.items()}
    core = auto_core(tiny["qwen2"], shared=True)
    for _ in ("cold", "warm"):
        got = drive(core, asked.values())
        assert {n: bits(got[str(n)]) for n in LENGTHS} == alone
        told = {n: got[str(n)][-1].kv for n in LENGTHS}
        assert told == {n: KEPT if n <= 194 else "k2v2" for n in LENGTHS}
        assert all(chunk.kv is None for chunks in got.values() for chunk in chunks[:-1])
    assert dict(core.stats().kv_chosen) == {KEPT: 6, "k2v2": 6}
    assert core.stats().encoded_pages_total > 0
    assert core.stats().attention_tree_steps_total > 0


def test_a_form_finds_its_own_pages_alone(tiny: dict[str, Path]) -> None:
    core = auto_core(tiny["qwen2"])
    prompt = prompt_of(400)
    found = []
    for length in (190, 190, 400, 400, 190):
        chunks = drive(core, [request(prompt[:length], PARAMS)])["r"]
        found.append(chunks[0].cached_tokens)
    assert found == [0, 190, 0, 384, 190]
    everything_is_given_back(core)


@pytest.mark.parametrize("beams", [False, True])
def test_what_is_told_at_the_end_tells_its_form(tiny: dict[str, Path], *, beams: bool) -> None:
    core = auto_core(tiny["qwen2"])
    params = SamplingParams(max_tokens=6, best_of=2, ignore_eos=True, use_beam_search=beams)
    for length, form in ((60, KEPT), (400, "k2v2")):
        chunks = drive(core, [request(prompt_of(length), params)])["r"]
        assert {chunk.kv for chunk in chunks} == {form}


def test_a_tenant_may_refuse_codes(tiny: dict[str, Path]) -> None:
    core = auto_core(tiny["qwen2"], terms={"a": TenantTerms(voter="a", coded=False)})
    drive(core, [request(prompt_of(400), PARAMS)])
    assert dict(core.stats().kv_chosen) == {KEPT: 1}
    assert core.stats().encoded_pages_total == 0
    drive(core, [request(prompt_of(400), PARAMS, tenant="b")])
    assert dict(core.stats().kv_chosen) == {KEPT: 1, "k2v2": 1}


def test_each_form_has_its_part_of_the_memory(tiny: dict[str, Path]) -> None:
    info = auto_core(tiny["qwen2"]).info
    assert info.kv == "auto"
    assert (16 << 20) - 64 * 4096 < info.kept_bytes <= 16 << 20
    assert info.kept_bytes + info.staged_bytes < info.kv_bytes <= 32 << 20


def test_pinned_prefixes_need_one_form(tiny: dict[str, Path], tmp_path: Path) -> None:
    pins = SharingOptions(policy="pinned", pinned=str(tmp_path / "pins.toml"))
    options = EngineOptions(model=str(tiny["qwen2"]), kv_cache_bytes=1 << 26, kv="auto", share=pins)
    with pytest.raises(ConfigError, match="share_pinned: pages of one form only"):
        build_core(options)
