"""Groups that go on from one another: the bits of the flat plan, and the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvkeep.attention.planner import FlatPlanner
from kvkeep.errors import KernelInputError
from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import Attended, AttentionPlan
from kvkeep.types import PAGE_TOKENS, Layout
from tests.counts import examples
from tests.forests import Asked, Filled, covers, eager, filled, geometry
from tests.ops.paths import LAYOUTS, PATHS, Path, ops_for
from tests.oracles import Heads, attention_oracle, causal, tolerance

HEADS = Heads(4, 2, 64)


def both(
    pool: Filled, asked: list[Asked], path: Path, threads: int = 2
) -> tuple[Attended, Attended]:
    """Attend one step by a tree's plan and by the flat one."""
    layout, heads = pool.world.layout, pool.heads
    step = geometry(asked, layout)
    tree = eager(heads.q // heads.kv).plan(step)
    flat = FlatPlanner().plan(step)
    assert tree.parents is not None, "nothing is shared"
    assert covers(tree, step)
    assert covers(flat, step)
    q = pool.queries(step.num_rows)
    ops = ops_for(path, threads)
    return ops.attend(q, pool.world.kv, tree), ops.attend(q, pool.world.kv, flat)


def assert_same_bits(one: Attended, other: Attended) -> None:
    assert torch.equal(one.out.view(torch.uint8), other.out.view(torch.uint8))
    assert torch.equal(one.lse2, other.lse2)


@pytest.fixture(scope="module")
def pools() -> dict[Layout, Filled]:
    return {layout: filled(ops_for(PATHS[-1]), HEADS, layout, 160) for layout in LAYOUTS}


@pytest.mark.parametrize("requests", [2, 15, 16, 17, 63, 64, 65, 129])
def test_a_prefix_of_many_requests(
    path: Path, layout: Layout, pools: dict[Layout, Filled], requests: int
) -> None:
    asked = [
        Asked([*range(6), 8 + i % 140, 9 + i % 140], 6 * PAGE_TOKENS + 1 + i % 90)
        for i in range(requests)
    ]
    assert_same_bits(*both(pools[layout], asked, path))


@pytest.mark.parametrize("shared", [4, 6, 14, 16, 18, 34])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ends_inside_and_at_spans(
    path: Path, layout: Layout, pools: dict[Layout, Filled], shared: int, threads: int
) -> None:
    asked = [
        Asked([*range(shared), *range(60, 60 + 20)], (shared + 20) * PAGE_TOKENS - 3),
        Asked([*range(shared), 90], shared * PAGE_TOKENS + 1),
        Asked([*range(shared), 91, 92], shared * PAGE_TOKENS + 64),
        Asked([100, 101], 70),
    ]
    tree, flat = both(pools[layout], asked, path, threads)
    assert_same_bits(tree, flat)


def test_against_the_oracle(path: Path, layout: Layout, pools: dict[Layout, Filled]) -> None:
    pool = pools[layout]
    asked = [
        Asked([*range(20), 70], 20 * PAGE_TOKENS + 5),
        Asked([*range(20), 71, 72], 20 * PAGE_TOKENS + 100),
        Asked([*range(8), 73], 8 * PAGE_TOKENS + 1),
    ]
    step = geometry(asked, layout)
    q = pool.queries(3)
    got = ops_for(path).attend(q, pool.world.kv, eager(2).plan(step))
    for row, one in enumerate(asked):
        k, v = pool.tokens(np.array(one.slots, np.int32), one.length)
        visible = causal(HEADS, [one.length - 1], one.length)
        exact = attention_oracle(q[row : row + 1], k, v, visible)
        error = np.abs(got.out[row : row + 1].double().numpy() - exact.out)
        assert (error <= tolerance(layout, exact.out)).all()
        assert np.abs(got.lse2[row].numpy() - exact.lse2[0]).max() <= 1e-3


def beside_a_prefix(shared: int, requests: int) -> list[Asked]:
    """Return requests on one prefix, each with 9 to 18 pages of its own that none begins with."""
    asked = []
    for i in range(requests):
        own = [shared + (i + 7 * j) % (160 - shared) for j in range(9 + i % 10)]
        asked.append(Asked([*range(shared), *own], (shared + len(own)) * PAGE_TOKENS - i))
    return asked


@pytest.mark.parametrize("kernel", available())
@pytest.mark.parametrize("shared", [16, 20, 32])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_few_rows_between_the_steps_of_many(
    kernel: CpuKernel, layout: Layout, pools: dict[Layout, Filled], shared: int, threads: int
) -> None:
    pool, ops = pools[layout], ops_for(kernel, threads)
    assert isinstance(ops, CpuAttention)
    asked = [
        *beside_a_prefix(shared, 20),
        Asked([*range(140, 150)], 600),
        Asked([150, 151], 99, 60),
    ]
    step = geometry(asked, layout)
    tree, q = eager(2).plan(step), pool.queries(step.num_rows)
    before = ops.bytes_read
    got = ops.attend(q, pool.world.kv, tree)
    kv, pages = pool.world.kv, int(tree.runs[:, 1].sum())
    assert ops.bytes_read - before == pages * kv.num_kv_heads * kv.unit_bytes
    assert ops.pieces_beside > 0
    assert_same_bits(got, ops.attend(q, pool.world.kv, FlatPlanner().plan(step)))


@st.composite
def forests(draw: st.DrawFn) -> list[Asked]:
    """Random forests: requests branch off earlier ones at random pages."""
    free = iter(range(160))
    asked: list[Asked] = []
    for _ in range(draw(st.integers(2, 9))):
        own = draw(st.integers(1, 9))
        slots: list[int] = []
        branches: bool = draw(st.booleans())
        if asked and branches:
            other = asked[draw(st.integers(0, len(asked) - 1))]
            slots = list(other.slots[: draw(st.integers(0, other.length // PAGE_TOKENS))])
        slots += [next(free) for _ in range(own)]
        length = (len(slots) - 1) * PAGE_TOKENS + draw(st.integers(1, PAGE_TOKENS))
        rows = draw(st.integers(1, min(length, 40)))
        asked.append(Asked(slots, length, rows, scope=draw(st.sampled_from("ab"))))
    return asked


@given(asked=forests(), threads=st.integers(1, 3), seed=st.integers(0, 99))
@settings(
    max_examples=examples(16, 40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
def test_any_forest_has_the_flat_plans_bits(
    path: Path,
    layout: Layout,
    pools: dict[Layout, Filled],
    asked: list[Asked],
    threads: int,
    seed: int,
) -> None:
    assume(path != "reference" or sum(one.rows for one in asked) < 20)
    pool = pools[layout]
    step = geometry(asked, layout)
    tree, flat = eager(2).plan(step), FlatPlanner().plan(step)
    assert covers(tree, step)
    q = pool.queries(step.num_rows)
    ops = ops_for(path, threads)
    want = ops.attend(q, pool.world.kv, flat)
    assert_same_bits(ops.attend(q, pool.world.kv, tree), want)
    order = np.random.default_rng(seed).permutation(len(asked))
    rows = np.concatenate(
        [np.arange(s.num_rows) + s.first_row for s in (step.segments[i] for i in order)]
    )
    shuffled = geometry([asked[i] for i in order], layout)
    again = ops.attend(q[torch.from_numpy(rows)], pool.world.kv, eager(2).plan(shuffled))
    assert torch.equal(again.out, want.out[torch.from_numpy(rows)])


@pytest.mark.parametrize("where", ["root", "leaf", "equal"])
def test_extreme_scores(path: Path, layout: Layout, where: str) -> None:
    pool = filled(ops_for(path), HEADS, layout, 24)
    keys = torch.zeros_like(pool.k) if where == "equal" else pool.k
    if where != "equal":
        keys[3 if where == "root" else 20, 7] *= 60.0
    slots = np.arange(24 * PAGE_TOKENS, dtype=np.int32)
    shape = (-1, HEADS.kv, HEADS.dim)
    ops_for(path).append(pool.world.kv, keys.view(shape), pool.v.view(shape), slots)
    asked = [Asked([*range(18), 20], 18 * 64 + 9), Asked([*range(18), 21], 18 * 64 + 3)]
    tree, flat = both(pool, asked, path)
    assert_same_bits(tree, flat)
    assert torch.isfinite(tree.out.float()).all()


def plan_of(asked: list[Asked], layout: Layout, **changes: object) -> AttentionPlan:
    plan = eager(2).plan(geometry(asked, layout))
    return AttentionPlan(
        **{
            **{name: getattr(plan, name) for name in AttentionPlan.__dataclass_fields__},
            **changes,
        }
    )


@pytest.mark.parametrize(
    "fault", ["orphan", "rows", "previous", "step", "order", "short", "parents"]
)
def test_plans_that_are_no_forest_are_refused(
    path: Path, layout: Layout, pools: dict[Layout, Filled], fault: str
) -> None:
    if fault == "step" and path == "reference":
        pytest.skip("the reference has no steps: it sums a row's tokens at once")
    asked = [Asked([*range(6), 20 + i], 6 * PAGE_TOKENS + 9) for i in range(4)]
    good = plan_of(asked, layout)
    assert good.parents is not None
    groups, parents, runs = good.groups.copy(), good.parents.copy(), good.runs.copy()
    changes: dict[str, object] = {}
    if fault == "orphan":
        parents[1] = 3
    elif fault == "rows":
        groups[2, 0:2] = groups[1, 0:2]
    elif fault == "previous":  # a child counted from the node before it, not from its parent
        groups[3, 0:2] += 1
    elif fault == "step":
        runs[0, 1] -= 1
    elif fault == "order":
        changes["row_order"] = np.zeros(4, np.int32)
    elif fault == "short":
        changes["row_order"] = np.zeros(3, np.int32)
    else:
        parents = parents[:-1]
    plan = plan_of(asked, layout, groups=groups, parents=parents, runs=runs, **changes)
    pool = pools[layout]
    with pytest.raises(KernelInputError):
        ops_for(path).attend(pool.queries(4), pool.world.kv, plan)


@pytest.mark.parametrize("kernel", available())
def test_a_shared_token_is_read_once_for_all_rows(
    kernel: CpuKernel, layout: Layout, pools: dict[Layout, Filled]
) -> None:
    pool, ops = pools[layout], ops_for(kernel)
    asked = [Asked([*range(32), 40 + i], 32 * PAGE_TOKENS + 1 + i % 64) for i in range(100)]
    plan = eager(2).plan(geometry(asked, layout))
    before = ops.bytes_read
    ops.attend(pool.queries(100), pool.world.kv, plan)
    kv = pool.world.kv
    assert ops.bytes_read - before == (32 + 100) * kv.num_kv_heads * kv.unit_bytes
