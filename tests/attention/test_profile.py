"""Measuring this machine: quick, finite, and without a trace in the pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch

from kvkeep import ops
from kvkeep.attention.cost import DEVICE_SEED, SEED, CostModel, scaled
from kvkeep.attention.profile import Bench, Timing, on_device, profile, profile_all
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.cpu import available
from kvkeep.ops.device import programs_of
from kvkeep.ops.layout import Attended, AttentionPlan, LayerKV, Observe
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout
from tests.ops.devices import DEVICE, OnDevice
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


# A device: calls are queued and take their time later


@dataclass
class Queued:
    """Kernels that take exactly what `ns_of` says, once somebody waits for them."""

    ns_of: Callable[[AttentionPlan], float]
    clock: float = 0.0
    pending: float = 0.0
    last: tuple[AttentionPlan, float] | None = None

    @property
    def bytes_read(self) -> int:
        return 0

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        assert observe is None
        assert kv.device_table is None, "the pool's own table is another one"
        if self.last is None or self.last[0] is not plan:
            self.last = plan, self.ns_of(plan)
        self.clock += 1e-9  # to queue it
        self.pending += self.last[1] / 1e9
        return Attended(q, torch.zeros(q.shape[:2]), None)

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        raise AssertionError("measuring writes nothing")

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("attend merges")

    def wait(self) -> None:
        self.clock += self.pending
        self.pending = 0.0


PROGRAMS, COLD_PAGES = 16, 64


def device_bench(ns_of: Callable[[AttentionPlan], float], pages: int = 128) -> Bench:
    """Return a measurement of queued kernels on a device of so many programs."""
    queued = Queued(ns_of)
    kv = make_world(HEADS, Layout.ROWS_F32, pages=pages, layers=1, layer=0).kv
    kv = replace(kv, device_table=torch.from_numpy(kv.tile_table))
    cold = COLD_PAGES * HEADS.kv * kv.unit_bytes
    timing = Timing(DEVICE_SEED, cold, queued.wait, 4, 64, lambda: queued.clock)
    return Bench(queued, kv, Layout.ROWS_F32, Layout.ROWS_F32, HEADS.q, PROGRAMS, timing)


def taking(model: CostModel) -> Callable[[AttentionPlan], float]:
    """Return what a plan takes on a device: its groups' costs, `PROGRAMS` at a time."""

    def ns_of(plan: AttentionPlan) -> float:
        assert plan.groups.shape[0] * HEADS.kv >= 4 * PROGRAMS, "too little to keep it busy"
        fresh = len(plan.pages) >= COLD_PAGES
        parents = [-1] * len(plan.groups) if plan.parents is None else plan.parents.tolist()
        total = 0.0
        for (begin, end, run, _), parent in zip(plan.groups.tolist(), parents, strict=True):
            rows = (end - begin) * HEADS.q // HEADS.kv
            tokens = int(plan.runs[run, 1]) * PAGE_TOKENS
            total += model.ns(rows, tokens, merges=parent >= 0) - tokens * model.a_mem * (not fresh)
        return total * HEADS.kv / PROGRAMS

    return ns_of


PLANTED = CostModel(c0=1_500.0, a_mem=27.0, a_row=0.2, a_merge=90.0)


def test_a_devices_coefficients_are_found_from_queued_calls() -> None:
    bench = device_bench(taking(PLANTED))
    assert asdict(profile(bench)) == pytest.approx(asdict(PLANTED), rel=1e-3)


def test_a_device_whose_launches_hide_all_else_gets_the_seed() -> None:
    """80 us a call, whatever is asked: neither reading nor rows can be seen."""
    assert profile(device_bench(lambda _plan: 80_000.0)) is DEVICE_SEED


def test_a_devices_merging_that_cannot_be_seen_costs_as_the_seed_has_it() -> None:
    found = profile(device_bench(taking(replace(PLANTED, a_merge=0.0))))
    assert found.a_merge == pytest.approx(scaled(DEVICE_SEED, found.a_mem).a_merge)
    assert found.a_mem == pytest.approx(PLANTED.a_mem, rel=1e-3)


def test_layouts_are_measured_in_one_unit_or_not_at_all() -> None:
    good, small, bound = (
        device_bench(taking(PLANTED)),
        device_bench(taking(PLANTED), pages=15),
        device_bench(lambda _plan: 80_000.0),
    )
    assert all(model is not DEVICE_SEED for model in profile_all([good, good]))
    assert profile_all([good, bound]) == (DEVICE_SEED, DEVICE_SEED)
    assert profile_all([small, good]) == (DEVICE_SEED, DEVICE_SEED)
    assert profile_all([bench(64), bench(64)])[0] is not SEED


def test_a_devices_kernels_attend_what_is_timed() -> None:
    kernels = OnDevice()
    kv = make_world(Heads(2, 1, 16), Layout.ROWS_F32, pages=16, layers=1, layer=0, device=DEVICE).kv
    kv.buffer.zero_()
    there = torch.from_numpy(kv.tile_table.copy()).to(DEVICE)
    timing = Timing(DEVICE_SEED, 1 << 12, lambda: None, calls=2)
    measured = Bench(
        kernels.inner,
        replace(kv, device_table=there),
        Layout.ROWS_F32,
        Layout.ROWS_F32,
        2,
        1,
        timing,
    )
    sample = measured.sample(1, 2, fresh=True)
    assert (sample.rows, sample.tokens, sample.fresh) == (2, 128, True)
    assert sample.ns > 0
    assert kernels.inner.calls % 2 == 0
    assert kernels.bytes_read == kernels.inner.calls * 4 * 2 * kv.unit_bytes


@pytest.mark.gpu
def test_a_gpus_costs_are_plausible() -> None:
    kernels = ops.select("triton", 1, "cuda")
    heads = Heads(32, 8, 128)
    kv = make_world(heads, Layout.ROWS_BF16, pages=1024, layers=1, layer=0, device="cuda").kv
    kv.buffer.zero_()
    there = torch.device("cuda")
    layout = Layout.ROWS_BF16
    measured = Bench(
        kernels.attention, kv, layout, layout, heads.q, programs_of(there), on_device(there)
    )
    found = profile(measured)
    assert found is not DEVICE_SEED
    assert 64 * found.ns(4, 4096) > 2 * found.ns(256, 4096)
