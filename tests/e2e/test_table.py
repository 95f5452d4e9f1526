"""The table of what can be combined: sharing x attention x codec x eviction.

In each cell of codec and eviction, an engine that shares nothing and reads every request alone
answers two tenants; an engine that shares, and reads trees, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

import pytest

from kvkeep.attention.planner import AttentionPlanner, FlatPlanner
from kvkeep.engine.api import GenerateRequest, SamplingParams
from kvkeep.engine.build import build_core, default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import (
    CodedName,
    EngineOptions,
    EvictName,
    PolicyName,
    SharingOptions,
)
from tests.calibrated import calibrated
from tests.e2e.test_coded import bits, prompt_of
from tests.engines import drive, request
from tests.forests import eager

PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=5, logprobs=1, ignore_eos=True)
CODECS = ("bf16", "auto", *get_args(CodedName))
EVICTS = get_args(EvictName)
POLICIES = tuple(name for name in get_args(PolicyName) if name not in ("isolate", "pinned"))
BYTES = {
    "bf16": (1.0, 2.0),
    "auto": (0.23, 0.24),
    "k8v8": (0.54, 0.55),
    "k4v4": (0.29, 0.30),
    "k4v2": (0.23, 0.24),
    "k2v2": (0.17, 0.18),
    "calibrated": (0.17, 0.30),
}
"""Least and most bytes of a coded token, of those in 16 bits, at a head_dim of 32."""


class Cell(NamedTuple):
    """One combination; `policy` and the tree planner are held against `isolate` and flat."""

    codec: str
    evict: str
    policy: str


def cells() -> Iterator[object]:
    """Yield every combination; every codec under `corm` and some of the rest run every time."""
    for i, (codec, evict) in enumerate(product(CODECS, EVICTS)):
        for j, policy in enumerate(POLICIES):
            often = j == i % len(POLICIES) and (evict == "corm" or i % 4 == 0)
            marks = () if often else (pytest.mark.slow,)
            yield pytest.param(
                Cell(codec, evict, policy), marks=marks, id=f"{codec}-{evict}-{policy}"
            )


@pytest.fixture(scope="module")
def model(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tiny["qwen3"], tmp_path_factory.mktemp("table") / "model")


def core_of(model: Path, cell: Cell, planner: AttentionPlanner) -> EngineCore:
    evicts = cell.evict != "off"
    options = EngineOptions(
        model=str(model),
        threads=2,
        kv=cell.codec,  # type: ignore[arg-type]
        evict=cell.evict,  # type: ignore[arg-type]
        evict_window=24 if evicts else None,
        evict_recent=16 if evicts else None,
        evict_weight={"off": None, "corm": 12.0}.get(cell.evict, 4.0),
        evict_spread={"off": None, "corm": 1}.get(cell.evict, 0),
        share=SharingOptions(policy=cell.policy, k=2),  # type: ignore[arg-type]
        kv_cache_bytes=64 << 20,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        chunk_tokens=64,
    )
    parts = default_parts(options)
    parts.planner = planner
    core = build_core(options, parts=parts)
    core.set_tenants({"a": 0.5, "b": 0.5})
    return core


def asked() -> list[GenerateRequest]:
    shared = prompt_of(256, 1)
    return [
        request(shared + prompt_of(75, 2 + i), PARAMS, id=f"{tenant}{i}", tenant=tenant)
        for tenant in "ab"
        for i in range(2)
    ]


@pytest.mark.parametrize("cell", list(cells()))
def test_all_of_it_goes_together(model: Path, cell: Cell) -> None:
    alone = core_of(model, cell._replace(policy="isolate"), FlatPlanner())
    want = [bits(drive(alone, [one])[one.id]) for one in asked()]
    together = core_of(model, cell, eager(2))
    for epoch in range(2):
        got = drive(together, asked())
        assert [bits(got[one.id]) for one in asked()] == want
        together.end_epoch(float(epoch))
    found = [core.stats().evict for core in (alone, together)]
    for times, (core, stats) in enumerate(zip((alone, together), found, strict=True), 1):
        assert stats.packed_views_total == (0 if cell.evict == "off" else 4 * times)
        assert stats.masked_only_total == 0
        assert (stats.freed_bytes_total > 0) == (cell.evict != "off")
        core.set_tenants({})
        assert core.stats().pages_used == core.stats().sharing.public_pages
    assert found[1].freed_bytes_total == 2 * found[0].freed_bytes_total
    info = alone.info
    halves = info.num_layers * info.num_kv_heads * info.head_dim * 4
    low, high = BYTES[cell.codec]
    assert low <= info.bytes_per_token / halves <= high
