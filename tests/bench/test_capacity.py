"""Pools that are filled until a request finds no room: who is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import capacity, harness
from bench.capacity import (
    CASES,
    FULL,
    MOST_SEQS,
    QUICK,
    Case,
    Filling,
    Rows,
    Size,
    chosen,
    figures_of,
    pages_for,
    started_for,
)
from bench.harness import Options
from bench.kept import Kept
from bench.made_up import MadeUpPages
from bench.ours import Ours
from bench.prescribed import Prescribed
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.errors import ConfigError
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.models import make
from kvkeep.quant.codec import Float, KVShape
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, Layout

SHAPE = KVShape(3, 2, 32, Layout.BF16)
PLAIN, SHARED, _, _, EVICTING, _ = CASES
TOKENS = 16 * PAGE_TOKENS
PAGES = 80


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capacity") / "model"
    return make.tiny("qwen3", folder, dtype="bfloat16", overrides={"vocab_size": 50_304})


def filling(model: Path, case: Case, pages: int = PAGES) -> Filling:
    """Return an empty pool of so many pages."""
    shares = np.array([0.5, 0.1], np.float32)
    evictor: Evictor = Prescribed(shares, kept=0.4) if case.evicts else KeepAll()
    parts = Parts(
        techniques=Techniques(Float(), NoShield(), evictor),
        policy=ShareNothing(),
        tier=MadeUpPages(Float(), SHAPE),
    )
    size = pages * Float().page_spec(SHAPE).page_bytes
    return Filling(Ours(model, threads=1, kv_cache_bytes=size, parts=parts), case, TOKENS)


def said(_: str) -> None:
    """Nobody listens."""


def test_as_many_run_as_the_pool_has_pages_for(model: Path) -> None:
    """Each holds 16 pages of its prompt and one that it grows into."""
    found = filling(model, PLAIN).filled(10, 8, said)
    assert found == (PAGES // 17, PAGES // 17 * 17, PAGES // 17 * 17)


def test_a_request_that_grows_into_no_room_is_not_counted(model: Path) -> None:
    """Four have room for 17 pages each, and none of them for an 18th."""
    assert filling(model, PLAIN, 4 * 17).filled(10, 8, said).requests == 4
    assert filling(model, PLAIN, 4 * 17).filled(10, PAGE_TOKENS, said).requests == 3


def test_no_more_are_submitted_than_an_engine_is_started_for(model: Path) -> None:
    assert filling(model, PLAIN).filled(2, 1, said).requests == 2


def test_shared_and_evicting_requests_take_fewer_pages(model: Path) -> None:
    shared = filling(model, SHARED).filled(20, 8, said)
    assert shared.requests == (PAGES - 8) // 9
    evicting = filling(model, EVICTING).filled(20, 8, said)
    assert evicting.requests > PAGES // 17
    assert evicting.pages < evicting.requests * 12
    assert evicting.most_pages > evicting.pages


def test_an_engine_is_started_for_about_what_its_pages_hold() -> None:
    coded = [case for case in CASES if not isinstance(case.codec, Float)]
    assert len(coded) == 3
    for case in coded:
        seqs = started_for(case, FULL)
        assert 2 <= started_for(case, QUICK) < seqs < MOST_SEQS
        assert started_for(case, Size(FULL.pool_bytes // 2, FULL.tokens, FULL.steps)) < seqs
    assert pages_for(EVICTING, 10, 8192) < pages_for(SHARED, 10, 8192) < pages_for(PLAIN, 10, 8192)
    assert started_for(PLAIN, FULL) == MOST_SEQS


def test_an_unknown_case_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'fp8'; there are: bf16, sharing, k2v2, corm"):
        chosen(Options(only=("fp8",)))
    assert [case.name for case in chosen(Options(only=("k2v2", "bf16")))] == ["bf16", "+ k2v2"]
    assert tuple(chosen(Options())) == CASES


def test_the_goal_is_of_caches_without_codes() -> None:
    rows: list[Rows] = [
        {"case": case.name, "requests": count}
        for case, count in zip(CASES, (4, 8, 40, 60, 14, 50), strict=True)
    ]
    gain, *others = figures_of(rows)
    assert (gain.name, gain.estimate.median) == ("concurrency_vs_keepall", 3.5)
    assert gain.goal is not None
    assert gain.goal.status(gain.estimate) == "shown"
    assert [(one.name, one.estimate.median) for one in others][-1] == ("requests_k4v2_corm", 50)
    assert figures_of(rows[1:])[0].name == "requests_sharing"


def test_cases_are_kept_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row: Rows = {"case": "bf16", "requests": 4, "part": 0.5, "none": None}
    monkeypatch.setattr(harness, "commit", lambda: "a" * 40)
    name = capacity.file_name("k4v2 + corm")
    assert name == "k4v2_corm"
    kept = Kept(Rows, tmp_path)
    assert kept.got(name, lambda: row) == row
    assert kept.got(name, Rows) == row
