"""Measuring this machine: quick, finite, and without a trace in the pool."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from kvkeep.attention.cost import SEED
from kvkeep.attention.profile import Bench, profile
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.cpu import available
from kvkeep.types import Layout
from tests.ops.paths import LAYOUTS, ops_for
from tests.oracles import Heads, make_world

HEADS = Heads(4, 2, 64)
CODED = (Layout.K2V2, Layout.K4V2, Layout.K4V4, Layout.K8V8)


def bench(
    pages: int,
    layout: Layout = Layout.BF16,
    heads: Heads = HEADS,
    stored: Layout | None = None,
) -> Bench:
    """Return a measurement over an empty pool of `pages` pages of one layer."""
    kv = make_world(heads, layout, pages=pages, layers=1, layer=0).kv
    kv.buffer.zero_()
    if stored is not None:
        kv = replace(kv, unit_bytes=64)
    return Bench(ops_for(available()[-1], 2), kv, layout, stored or layout, heads.q, 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_small_pool_gives_costs_in_a_blink(layout: Layout) -> None:
    measured = bench(64, layout)
    begun = time.perf_counter()
    model = profile(measured)
    assert time.perf_counter() - begun < 0.3
    assert np.isfinite(list(asdict(model).values())).all()
    assert model.a_row > 0
    assert model.ns(1, 1024) > 0
    assert model.ns(64, 4096) > 2 * model.ns(1, 4096), "64 rows cost no more than one"
    assert model.ns(4, 8192) > 4 * model.ns(4, 1024), "cost does not grow with tokens"


@pytest.mark.parametrize("pages", [1, 15])
def test_a_pool_too_small_to_measure_gives_the_seed(pages: int) -> None:
    assert profile(bench(pages)) is SEED


@pytest.mark.parametrize("stored", CODED, ids=lambda layout: layout.name)
def test_codes_are_measured_on_codes(stored: Layout) -> None:
    """The plan that is timed reads tiles of that layout, as many bytes as they have."""
    measured = bench(64, stored=stored)
    before = measured.ops.bytes_read
    sample = measured.sample(1, 4, fresh=False)
    read = measured.ops.bytes_read - before
    sinks = tile_bytes(stored, HEADS.dim, first=True) - tile_bytes(stored, HEADS.dim)
    chain = 2 * (4 * tile_bytes(stored, HEADS.dim) + sinks)
    assert read > 0
    assert read % chain == 0
    assert sample.tokens == 256
    assert profile(measured).a_row > 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_merging_is_measured_on_groups_that_go_on(layout: Layout) -> None:
    ns, error = bench(64, layout).merging()
    assert np.isfinite([ns, error]).all()
    assert error >= 0


def test_the_smallest_pool_that_can_be_measured_is() -> None:
    assert profile(bench(16)) is not SEED


def test_measuring_writes_nothing() -> None:
    measured = bench(40)
    rng = np.random.default_rng(0)
    buffer = measured.kv.buffer.numpy()
    buffer[:] = rng.integers(0, 60, len(buffer), np.uint8)
    before, table = buffer.copy(), measured.kv.tile_table.copy()
    profile(measured)
    assert np.array_equal(measured.kv.buffer.numpy(), before)
    assert np.array_equal(measured.kv.tile_table, table)


@pytest.mark.parametrize("queries", [1, 5])
def test_an_item_tells_its_rows_and_tokens(queries: int) -> None:
    sample = bench(64, heads=Heads(6, 2, 32)).sample(queries, 16, fresh=True)
    assert (sample.rows, sample.tokens, sample.fresh) == (queries * 3, 1024, True)
    assert 0 < sample.ns < 1e8
