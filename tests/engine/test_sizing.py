"""How memory is divided: what a step may need is there, whoever asks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sizing import divide, most_pages, staged_pages
from kvkeep.errors import ConfigError
from kvkeep.types import PAGE_TOKENS, Layout, PageSpec

CODED = PageSpec(Layout.K2V2, 2, 2, 128, 5120, window_tokens=256, first_extra_bytes=2048)
STAGED = 32768


def options(**changes: int) -> EngineOptions:
    return EngineOptions(model="m", **{"max_num_seqs": 4, "max_num_batched_tokens": 256, **changes})  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=4),
    st.sampled_from([128, 256, 512]),
)
def test_no_step_needs_more_staged_pages_than_there_are(
    segments: list[tuple[int, int]], window: int
) -> None:
    """A step has one row per decode, and prefill rows within its budget."""
    budget = sum(count for _, count in segments if count > 1)
    needed = 0
    for start, count in segments:
        first = start // window * window // PAGE_TOKENS
        needed += -(-(start + count) // PAGE_TOKENS) - first
    assert needed <= staged_pages(window, options(max_num_batched_tokens=max(1, budget)))


@pytest.mark.parametrize("mebibytes", [4, 16, 100, 1000])
def test_the_memory_is_used_and_not_exceeded(mebibytes: int) -> None:
    wanted = mebibytes << 20
    pages, beside = divide(CODED, STAGED, wanted, options(), 10**9)
    assert beside is not None
    assert beside.num_staged == staged_pages(256, options())
    assert beside.num_first == min(pages, pages // 16 + 5)
    used = 4 * (pages * 5120 + beside.num_first * 7168 + beside.num_staged * STAGED)
    assert wanted - 4 * (5120 + 7168) < used <= wanted


def test_no_more_pages_than_asked_for() -> None:
    assert divide(CODED, STAGED, 1 << 30, options(), 50).num_pages == 50
    plain = PageSpec(Layout.BF16, 2, 2, 128, STAGED)
    assert divide(plain, STAGED, 1 << 30, options(), 50) == (50, None)


def test_memory_that_is_asked_for_is_used_beyond_what_sequences_can_fill() -> None:
    assert most_pages(options(max_num_seqs=4), 1000) == 4 * 17
    asked = options(max_num_seqs=4, kv_cache_bytes=1 << 30)
    plain = PageSpec(Layout.BF16, 2, 2, 128, STAGED)
    pages = divide(plain, STAGED, 1 << 30, asked, most_pages(asked, 1000)).num_pages
    assert pages == (1 << 30) // plain.page_bytes


def test_too_little_memory_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"recent tokens of max_num_seqs = 64 .* lower max_num"):
        divide(CODED, STAGED, 16 << 20, options(max_num_seqs=64), 1000)
    with pytest.raises(ConfigError, match="hold no two pages of"):
        divide(PageSpec(Layout.BF16, 2, 2, 128, STAGED), STAGED, 200_000, options(), 1000)
