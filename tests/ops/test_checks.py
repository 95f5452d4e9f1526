"""What every attention path refuses before a kernel runs, and what concerns one row alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import KernelInputError
from kvkeep.ops.checks import validate
from kvkeep.ops.layout import AttentionOps, AttentionPlan, LayerKV
from kvkeep.types import PAGE_TOKENS, Layout
from tests.counts import examples
from tests.forests import Asked, eager, filled, geometry
from tests.ops.devices import DEVICE, OnDevice
from tests.ops.paths import PATHS, ops_for
from tests.oracles import Heads

HEADS = Heads(4, 2, 32)
REQUESTS = 4
NOT_FINITE = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""The interpreter's numpy warns of what the tests are about."""

LAST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Side:
    """A path, a pool of its layout, and a step of several requests on one prefix."""

    ops: AttentionOps
    kv: LayerKV
    q: torch.Tensor
    plan: AttentionPlan


def side_of(path: str) -> Side:
    on_device = path == "triton"
    ops: AttentionOps = OnDevice() if on_device else ops_for(path)  # type: ignore[arg-type]
    layout = Layout.ROWS_F32 if on_device else Layout.F32
    pool = filled(ops, HEADS, layout, 24, device=DEVICE if on_device else "cpu")
    asked = [Asked([*range(6), 10 + i], 6 * PAGE_TOKENS + 9 + i) for i in range(REQUESTS)]
    plan = eager(2).plan(geometry(asked, layout))
    assert plan.parents is not None
    return Side(ops, pool.world.kv, pool.queries(REQUESTS), plan)


@pytest.fixture(params=[*PATHS, "triton"], scope="module")
def side(request: pytest.FixtureRequest) -> Side:
    return side_of(request.param)


def heads(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda q: q.repeat(1, 2, 1)[:, :count]


QUERIES: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("heads that no KV head has", heads(3), "3 heads of 32; the pool has 2 of 32"),
    ("no heads", heads(0), "0 heads"),
    ("another head_dim", lambda q: q[..., :16], "heads of 16; the pool has 2 of 32"),
    ("a row too many", lambda q: torch.cat([q, q[:1]]), "plan has 4 rows, q has 5"),
    ("no rank", lambda q: q[0], r"q has 2 dimensions; pass \[T, Hq, D\]"),
    ("heads and dims in one", lambda q: q.flatten(1), "q has 2 dimensions"),
]


@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in QUERIES], ids=[c[0] for c in QUERIES]
)
def test_queries_that_do_not_fit_are_refused(
    side: Side, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    before = side.ops.bytes_read
    with pytest.raises(KernelInputError, match=message):
        side.ops.attend(change(side.q), side.kv, side.plan)
    assert side.ops.bytes_read == before, "a kernel ran"


def at(name: str, place: tuple[int, ...], value: int) -> Callable[[AttentionPlan], AttentionPlan]:
    """Return what changes one entry of an array of a plan."""

    def change(plan: AttentionPlan) -> AttentionPlan:
        array = getattr(plan, name).copy()
        array[place] = value
        return replace(plan, **{name: array})

    return change


def masks(*shape: int) -> Callable[[AttentionPlan], AttentionPlan]:
    return lambda plan: replace(plan, masks=np.ones((len(plan.pages), *shape), np.uint64))


def private(*shape: int) -> Callable[[AttentionPlan], AttentionPlan]:
    return lambda plan: replace(plan, private_tiles=np.zeros((1, *shape), np.int32))


PLANS: list[tuple[str, Callable[[AttentionPlan], AttentionPlan], str]] = [
    ("a page above the table", at("pages", (3,), 24), "outside the pool's tile table"),
    ("a page far above it", at("pages", (3,), LAST), "outside the pool's tile table"),
    ("a tile it does not bring", at("pages", (3,), -1), "outside the pool's tile table"),
    ("a run past the pages", at("runs", (1, 1), 2 * REQUESTS), "outside the plan's pages"),
    ("a run of so many", at("runs", (1, 1), LAST), "outside the plan's pages"),
    ("a run before the pages", at("runs", (1, 0), -1), "outside the plan's pages"),
    ("less than no pages", at("runs", (1, 1), -1), "outside the plan's pages"),
    ("a run inside a page", at("runs", (1, 2), 65), "inside a page"),
    ("a run at the end of time", at("runs", (1, 2), LAST - 63), "last position"),
    ("a group past the rows", at("groups", (4, 1), 5), "outside the plan's rows or runs"),
    ("a group past the runs", at("groups", (4, 3), 6), "outside the plan's rows or runs"),
    ("a group before the rows", at("groups", (1, 0), -1), "group"),
    ("a group before the runs", at("groups", (1, 2), -1), "group"),
    ("a parent after its child", at("parents", (1,), 4), "before its parent"),
    ("a parent in a circle", at("parents", (2,), 2), "before its parent"),
    ("a row in two leaves", at("groups", (2, 0), 0), "group"),
    ("a row in no leaf", at("groups", (1, 1), 0), "group"),
    ("masks of one layer", masks(1, 2), r"live masks must be \[E, L, Hkv\]"),
    ("masks of one head", masks(2, 1), r"live masks must be \[E, L, Hkv\]"),
    ("masks of every head in one", masks(4), r"live masks must be \[E, L, Hkv\]"),
    ("a mask too few", lambda p: replace(p, masks=np.ones((3, 2, 2), np.uint64)), "live masks"),
    ("private tiles of one layer", private(1, 2), "private tiles must be"),
    ("private tiles of one head", private(2, 1), "private tiles must be"),
    ("groups of three", lambda p: replace(p, groups=p.groups[:, :3]), r"must be \[n, 4\]"),
    ("runs of three", lambda p: replace(p, runs=p.runs[:, :3]), r"must be \[n, 4\]"),
    ("pages in pairs", lambda p: replace(p, pages=p.pages.reshape(-1, 2)), r"its pages \[E\]"),
    ("an orphan", lambda p: replace(p, parents=np.array([-1], np.int32)), "differ in length"),
    (
        "an order too short",
        lambda p: replace(p, row_order=np.arange(3, dtype=np.int32)),
        "differ in length",
    ),
    ("an order that repeats", lambda p: replace(p, row_order=np.zeros(4, np.int32)), "order"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in PLANS], ids=[c[0] for c in PLANS])
def test_plans_that_do_not_fit_are_refused(
    side: Side, change: Callable[[AttentionPlan], AttentionPlan], message: str
) -> None:
    before = side.ops.bytes_read
    with pytest.raises(KernelInputError, match=message):
        side.ops.attend(side.q, side.kv, change(side.plan))
    assert side.ops.bytes_read == before, "a kernel ran"


def test_a_plan_that_fits_is_attended(side: Side) -> None:
    validate(side.q, side.kv, side.plan)
    assert bool(torch.isfinite(side.ops.attend(side.q, side.kv, side.plan).out).all())


SEVERAL = [*PATHS, pytest.param("triton", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
"""For what takes the interpreter long."""

ARRAYS = ("row_positions", "groups", "runs", "pages", "parents")


@pytest.mark.parametrize("side", SEVERAL, indirect=True)
@given(
    name=st.sampled_from(ARRAYS),
    place=st.integers(0, 99),
    value=st.sampled_from(
        [-LAST - 1, -65, -2, -1, 0, 1, 2, 3, 5, 23, 24, 64, 128, LAST - 63, LAST]
    ),
)
@settings(max_examples=examples(60, 200), deadline=None)
def test_one_wrong_number_is_refused_or_harmless(
    side: Side, name: str, place: int, value: int
) -> None:
    """Whatever stands in a plan, no kernel reads outside its arrays: it refuses or returns."""
    array = getattr(side.plan, name).copy()
    array.flat[place % array.size] = value
    plan = replace(side.plan, **{name: array})
    try:
        got = side.ops.attend(side.q, side.kv, plan)
    except KernelInputError:
        return
    assert got.out.shape == side.q.shape
    assert bool(torch.isfinite(got.out).all())


@NOT_FINITE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("bad", range(REQUESTS))
def test_a_query_that_is_not_finite_changes_no_bit_of_another_row(
    side: Side, bad: int, value: float
) -> None:
    """It shows in its own row, whose request ends; the step goes on."""
    want = side.ops.attend(side.q, side.kv, side.plan)
    q = side.q.clone()
    q[bad, 1, 5] = value
    got = side.ops.attend(q, side.kv, side.plan)
    others = [row for row in range(REQUESTS) if row != bad]
    assert torch.equal(got.out[others], want.out[others])
    assert torch.equal(got.lse2[others], want.lse2[others])
    assert torch.equal(got.out[bad, 0], want.out[bad, 0]), "another head of that row"
    assert not bool(torch.isfinite(got.out[bad, 1]).all())


@NOT_FINITE
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_keys_that_are_not_finite_concern_who_reads_them(value: float) -> None:
    """On every path, in a pool of its own: one request's leaf holds them."""
    for path in (*PATHS, "triton"):
        side = side_of(path)
        want = side.ops.attend(side.q, side.kv, side.plan)
        k = torch.full((1, HEADS.kv, HEADS.dim), value)
        slots = np.array([11 * PAGE_TOKENS + 2], np.int32)
        side.ops.append(side.kv, k, torch.ones_like(k), slots)
        got = side.ops.attend(side.q, side.kv, side.plan)
        others = [0, 2, 3]
        assert torch.equal(got.out[others], want.out[others])
        assert torch.equal(got.lse2[others], want.lse2[others])
        assert not bool(torch.isfinite(got.out[1]).all())
