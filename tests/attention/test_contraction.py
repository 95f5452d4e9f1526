"""Which nodes are dropped: ours by cost, the published rules by hand; dropping changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvkeep.attention.chains import Chain, chains_of
from kvkeep.attention.contraction import Costs, Keep, contract, ours, predicted_ns
from kvkeep.attention.cost import CostModel
from kvkeep.attention.planner import FlatPlanner, plan_of, row_bounds
from kvkeep.attention.tree import Forest, Node, build_forest, flat_forest
from kvkeep.ops.cpu import available
from kvkeep.types import PAGE_TOKENS, Layout
from tests.attention.chained import branching, chain, is_whole, nodes_of
from tests.counts import examples
from tests.forests import ALWAYS, Asked, Filled, covers, filled, geometry
from tests.ops.paths import LAYOUTS, ops_for
from tests.oracles import Heads

HEADS = Heads(4, 2, 64)


def decide(keep: Keep, tokens: int, below: Sequence[tuple[int, int]]) -> bool:
    """Ask about a root of `tokens` tokens with children of (rows, tokens) each."""
    bounds = [0]
    for rows, _ in below:
        bounds.append(bounds[-1] + rows)
    end = tokens // 64
    children = [Node(end, end + n // 64, 0, i, i + 1) for i, (_, n) in enumerate(below)]
    return keep(Node(0, end, -1, 0, len(below)), children, bounds)


def by(model: CostModel) -> Callable[[Node], CostModel]:
    """Return the model of every node."""
    return lambda _node: model


def choose(chosen: set[tuple[int, int, int]]) -> Keep:
    """Keep exactly the nodes at (first, last, end)."""
    return lambda node, _children, _bounds: (node.first, node.last, node.end) in chosen


@given(chains=branching(), data=st.data())
@settings(max_examples=examples(80, 200), deadline=None)
def test_any_nodes_may_be_dropped(chains: list[Chain], data: st.DataObject) -> None:
    forest = build_forest(chains)
    inner = [n for n in forest.nodes if n.last - n.first > 1]
    chosen = {(n.first, n.last, n.end) for n in inner if data.draw(st.booleans())}
    kept = contract(forest, row_bounds(chains, forest.order), choose(chosen))
    assert is_whole(kept, chains)
    assert {(n.first, n.last, n.end) for n in kept.nodes if n.last - n.first > 1} == chosen
    assert all(node.parent < i for i, node in enumerate(kept.nodes))


def test_keeping_all_changes_nothing_and_none_leaves_the_flat_forest() -> None:
    chains = chains_of(geometry([Asked([*range(9), 20 + i], 600) for i in range(4)], Layout.F32))
    forest = build_forest(chains)
    bounds = row_bounds(chains, forest.order)
    assert contract(forest, bounds, lambda *_: True) == forest
    none = contract(forest, bounds, lambda *_: False)
    assert nodes_of(none) == nodes_of(flat_forest(chains))


@pytest.fixture(scope="module")
def pools() -> dict[Layout, Filled]:
    return {layout: filled(ops_for("portable"), HEADS, layout, 100) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_dropping_any_nodes_changes_no_bit(
    pools: dict[Layout, Filled], layout: Layout, data: st.DataObject
) -> None:
    pool = pools[layout]
    spine = list(range(24))
    ends = (3, 7, 7, 12, 12, 18, 21, 23)
    rows = (1, 1, 30, 1, 2, 1, 1, 3)
    asked = [
        Asked([*spine[:end], *range(30 + 4 * i, 34 + 4 * i)], (end + 4) * 64 - 5 * i - 1, n)
        for i, (end, n) in enumerate(zip(ends, rows))
    ]
    step = geometry(asked, layout)
    chains = chains_of(step)
    forest = build_forest(chains)
    inner = [n for n in forest.nodes if n.last - n.first > 1]
    assert len(inner) >= 5
    chosen = {(n.first, n.last, n.end) for n in inner if data.draw(st.booleans())}
    tree = plan_of(step, chains, contract(forest, row_bounds(chains, forest.order), choose(chosen)))
    assert covers(tree, step)
    q = pool.queries(step.num_rows)
    for kernel in {"portable", available()[-1]}:
        ops = ops_for(kernel, 2)
        got, want = (ops.attend(q, pool.world.kv, p) for p in (tree, FlatPlanner().plan(step)))
        assert torch.equal(got.out.view(torch.uint8), want.out.view(torch.uint8))
        assert torch.equal(got.lse2, want.lse2)


# ours: apart = c0 + n (a_mem + a_row max(M, 4)) + a_merge M; kept below 0.95 of the children's sum


@pytest.mark.parametrize(("tokens", "kept"), [(64, False), (192, False), (256, True), (512, True)])
def test_ours_keeps_no_node_below_256_tokens(tokens: int, kept: bool) -> None:
    assert decide(ours(by(ALWAYS), 1), tokens, [(1, 64)] * 50) is kept


@pytest.mark.parametrize(
    ("model", "rows", "kept"),
    [
        (CostModel(100.0, 10.0, 1.0, 40.0), 1, True),  # 3,764 against 7,168
        (CostModel(100.0, 0.0, 1.0, 40.0), 1, True),  # 1,204 against 2,048: fewer than 4 rows
        (CostModel(100.0, 0.0, 1.0, 40.0), 8, False),  # 4,836 against 4,096
        (CostModel(0.0, 0.80, 1.0, 0.0), 8, False),  # 16.80 against 0.95 * 17.60 = 16.72
        (CostModel(0.0, 1.00, 1.0, 0.0), 8, True),  # 17.00 against 0.95 * 18.00 = 17.10
        (CostModel(0.0, 10.0, 1.0, 1000.0), 1, True),  # 5,584 against 7,168
        (CostModel(0.0, 10.0, 1.0, 1700.0), 1, False),  # 6,984: merging costs too much
        (CostModel(4000.0, 10.0, 1.0, 0.0), 1, False),  # 7,584: starting a node does
    ],
)
def test_ours_drops_a_node_where_cost_rises(model: CostModel, rows: int, kept: bool) -> None:
    assert decide(ours(by(model), 1), 256, [(rows, 64)] * 2) is kept


def test_ours_counts_query_heads() -> None:
    model = CostModel(0.0, 1.0, 1.0)
    assert decide(ours(by(model), 8), 256, [(1, 64)] * 2)
    assert not decide(ours(by(model), 16), 256, [(1, 64)] * 2)  # 33.0 against 0.95 * 34 = 32.3


def test_a_dropped_parent_is_weighed_with_its_children_as_left() -> None:
    """The deepest node is decided first: its parent sees the grandchildren in its place."""
    nodes = (
        Node(0, 8, -1, 0, 3),
        Node(8, 10, 0, 0, 2),
        Node(10, 11, 1, 0, 1),
        Node(10, 12, 1, 1, 2),
        Node(8, 9, 0, 2, 3),
    )
    asked: list[tuple[int, int]] = []

    def keep(node: Node, children: Sequence[Node], bounds: Sequence[int]) -> bool:
        asked.append((node.end, len(children)))
        return node.end == 8

    kept = contract(Forest((0, 1, 2), nodes), [0, 1, 2, 3], keep)
    assert asked == [(10, 2), (8, 3)]
    assert kept.nodes == (
        Node(0, 8, -1, 0, 3),
        Node(8, 11, 0, 0, 1),
        Node(8, 12, 0, 1, 2),
        Node(8, 9, 0, 2, 3),
    )


def test_a_forests_cost_is_its_nodes() -> None:
    model = CostModel(100.0, 10.0, 1.0, 40.0)
    forest = Forest((0, 1), (Node(0, 4, -1, 0, 2), Node(4, 5, 0, 0, 1), Node(4, 6, 0, 1, 2)))
    root = 100 + 256 * (10 + 6)  # three rows of two heads, no merge
    leaves = 100 + 64 * (10 + 4) + 40 * 2 + 100 + 128 * (10 + 4) + 40 * 4
    chains = [chain(range(5)), chain(range(6))]
    costs = Costs(chains, forest.order, model, CostModel(1e9, 1e9, 1e9))
    assert predicted_ns(forest, [0, 1, 3], costs, 2) == root + leaves


def test_coded_pages_cost_what_their_layout_does() -> None:
    plain, coded = CostModel(100.0, 10.0, 1.0, 40.0), CostModel(70.0, 3.0, 2.0, 50.0)
    chains = [replace(chain(range(9)), coded=n) for n in (6, 6, 0, 0)]
    costs = Costs(chains, (3, 0, 1, 2), plain, coded)
    root = Node(0, 4, -1, 1, 3)
    assert costs.model_of(root) is coded
    assert costs.model_of(Node(0, 4, -1, 0, 1)) is plain
    assert costs.ns(root, 8) == 70 + 256 * (3 + 16)
    leaf = Node(4, 9, 0, 1, 2)
    assert costs.ns(leaf, 8) == 70 + 128 * (3 + 16) + 192 * (10 + 8) + 50 * 8
    assert costs.ns(Node(6, 9, 0, 1, 2), 8) == 100 + 192 * (10 + 8) + 40 * 8


def test_a_prefix_that_stays_in_the_cache_is_read_again_for_nothing() -> None:
    model = CostModel(c0=0.0, a_mem=30.0, a_row=3.0)
    node = Node(0, 16, -1, 0, 2)
    children = [Node(16, 17, 0, 0, 1), Node(16, 17, 0, 1, 2)]
    assert ours(by(model), 4)(node, children, [0, 1, 2])
    assert not ours(by(model), 4, cached_tokens=17 * PAGE_TOKENS)(node, children, [0, 1, 2])
    assert ours(by(model), 4, cached_tokens=17 * PAGE_TOKENS - 1)(node, children, [0, 1, 2])
