"""Every form of pages under selective sharing, read by trees: what k others sent changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Final, get_args

import pytest

from kvkeep.attention.planner import AttentionPlanner, FlatPlanner
from kvkeep.engine.api import SamplingParams, TenantTerms
from kvkeep.engine.build import build_core, default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import CodedName, EngineOptions, KvName, PolicyName, SharingOptions
from kvkeep.models.text import TextModel
from tests.calibrated import calibrated
from tests.e2e.test_coded import bits
from tests.engine.test_sharing import TEMPLATE, ClearsAll, end_epochs
from tests.engines import drive, request
from tests.forests import eager

FORMS: Final[tuple[KvName, ...]] = ("bf16", "auto", *get_args(CodedName))
SENDERS: Final = ("a", "b")
READERS: Final = ("x", "y")
TRUNK: Final = 512
"""Two units."""
PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=5, logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tiny["qwen3"], tmp_path_factory.mktemp("forms") / "model")


def core_of(model: Path, kv: KvName, policy: PolicyName, planner: AttentionPlanner) -> EngineCore:
    options = EngineOptions(
        model=str(model),
        threads=2,
        kv=kv,
        kv_auto_tokens=TRUNK,
        kv_cache_bytes=64 << 20,
        max_num_seqs=8,
        share=SharingOptions(policy=policy, k=len(SENDERS)),
    )
    parts = default_parts(options)
    parts.planner, parts.inspector = planner, ClearsAll()
    core = build_core(options, parts=parts)
    names = (*SENDERS, *READERS)
    group = {name: TenantTerms(voter=name, group="all") for name in names}
    core.set_tenants(dict.fromkeys(names, 0.2), group)
    return core


@pytest.mark.parametrize("kv", FORMS)
def test_what_others_sent_is_read_in_every_form_and_changes_no_bit(model: Path, kv: KvName) -> None:
    text = TextModel.load(model)
    trunk = text.encode(TEMPLATE)[:TRUNK]
    ends = [text.encode(f"And how is it in {place}? " * 9)[:70] for place in ("Rome", "Oslo")]
    asked = [
        request([*trunk, *end], PARAMS, id=name, tenant=name)
        for name, end in zip(READERS, ends, strict=True)
    ]
    alone = core_of(model, kv, "isolate", FlatPlanner())
    want = {one.id: bits(drive(alone, [one])[one.id]) for one in asked}
    core = core_of(model, kv, "selective", eager(2))
    for name in SENDERS:
        drive(core, [request(trunk, PARAMS, id=name, tenant=name)])
    end_epochs(core)
    got = drive(core, asked)
    assert {one.id: bits(got[one.id]) for one in asked} == want
    stats = core.stats()
    assert stats.sharing.saved_tokens == len(READERS) * TRUNK
    assert stats.attention_tree_steps_total > 0
    assert (stats.encoded_pages_total > 0) == (kv != "bf16")
    assert all(found[0].cached_tokens == 0 for found in got.values())
    core.close()
    alone.close()
