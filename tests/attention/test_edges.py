"""The published rules, edge by edge: by hand, and whatever they decide, every chain is whole."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvkeep.attention.chains import Chain, chains_of
from kvkeep.attention.edges import Leaves, fasttree, pat, without_edges
from kvkeep.attention.planner import plan_of
from kvkeep.attention.tree import build_forest, flat_forest
from kvkeep.types import Layout
from tests.attention.chained import branching, chain, is_whole, nodes_of
from tests.counts import examples
from tests.forests import Asked, covers, geometry


@given(chains=branching(), data=st.data())
@settings(max_examples=examples(80, 200), deadline=None)
def test_any_children_may_leave(chains: list[Chain], data: st.DataObject) -> None:
    kept = without_edges(build_forest(chains), chains, lambda *_: data.draw(st.booleans()))
    assert is_whole(kept, chains)
    assert all(node.parent < i for i, node in enumerate(kept.nodes))
    assert all(node.last - node.first > 1 or node.end >= node.begin for node in kept.nodes)


@given(chains=branching())
@settings(max_examples=examples(40, 100), deadline=None)
def test_none_leaving_changes_nothing_and_all_leave_the_flat_forest(chains: list[Chain]) -> None:
    forest = build_forest(chains)
    assert nodes_of(without_edges(forest, chains, lambda *_: False)) == nodes_of(forest)
    longer = [
        chain([*c.pages.tolist(), 30_000 + i], shareable=c.shareable, view=i, first_row=i)
        for i, c in enumerate(chains)
    ]
    flat = without_edges(build_forest(longer), longer, lambda *_: True)
    assert nodes_of(flat) == nodes_of(flat_forest(longer))


def of(tails: list[int], shared: int = 8) -> list[Chain]:
    """Return chains on `shared` pages with as many of their own as told, each a row."""
    return [
        chain([*range(shared), *range(100 * i + 100, 100 * i + 100 + n)], first_row=i, view=i)
        for i, n in enumerate(tails)
    ]


def test_one_child_leaves_and_the_others_stay_together() -> None:
    chains = of([1, 2, 3])
    kept = without_edges(build_forest(chains), chains, lambda _q, _n, _own, below: below == 128)
    assert nodes_of(kept) == {
        (frozenset({0, 2}), 0, 8),
        (frozenset({0}), 8, 9),
        (frozenset({2}), 8, 11),
        (frozenset({1}), 0, 10),
    }


def test_a_child_is_weighed_with_those_that_have_not_left() -> None:
    chains = of([1, 1, 1, 1])
    asked: list[tuple[int, int, int, int]] = []

    def leaves(*numbers: int) -> bool:
        asked.append(numbers)  # type: ignore[arg-type]
        return len(asked) == 2

    without_edges(build_forest(chains), chains, leaves)
    assert asked == [(4, 512, 1, 64), (4, 512, 1, 64), (3, 512, 1, 64), (3, 512, 1, 64)]


def test_a_child_that_left_is_longer_for_its_own_children() -> None:
    """Two pairs on nodes of their own below one root; one pair leaves the root."""
    spine = [*range(4)]
    chains = [
        chain([*spine, *range(40 * pair, 40 * pair + 4), 300 + 10 * pair + i], view=2 * pair + i)
        for pair in (1, 2)
        for i in range(2)
    ]
    asked: list[tuple[int, int]] = []

    def leaves(queries: int, length: int, _own: int, below: int) -> bool:
        asked.append((length, below))
        return queries == 4 and len(asked) == 1

    kept = without_edges(build_forest(chains), chains, leaves)
    assert asked == [(256, 256), (256, 256), *[(512, 64)] * 4]
    assert is_whole(kept, chains)
    assert {n[1:] for n in nodes_of(kept) if len(n[0]) == 2} == {(0, 8)}


def test_a_request_that_ends_with_a_node_is_not_asked_about() -> None:
    chains = [*of([1, 1]), chain(range(8), shareable=8, view=9)]

    def leaves(_q: int, _n: int, _own: int, below: int) -> bool:
        assert below > 0
        return False

    assert is_whole(without_edges(build_forest(chains), chains, leaves), chains)


# FastTree: product(q, n) = 0.66 padQ g n + 0.33 padK q g, queries in tiles of 64 / g, keys of 32


@pytest.mark.parametrize(
    ("group", "queries", "tokens", "own", "below", "left"),
    [
        (1, 64, 1024, 1, 64, False),  # 2,661 against 676 + 45,239
        (1, 65, 1024, 64, 64, True),  # 42,584 against 42,578: the 64 fill a tile alone
        (1, 64, 1024, 32, 64, False),  # 1,355 against 21,627 + 22,979
        (4, 2, 64, 1, 64, False),  # 4,900 against 7,603
        (64, 2, 64, 1, 64, True),  # 0.1 against 0: nothing saved but the merge
        (1, 1, 1024, 1, 64, True),  # the last one
    ],
)
def test_fasttrees_rule(
    group: int, queries: int, tokens: int, own: int, below: int, left: bool
) -> None:
    assert fasttree(group)(queries, tokens, own, below) is left


# PAT: a child leaves where (tiles(S) - tiles(S - s) - tiles(s)) n + 4 s >= 0, tiles of 64 / g


@pytest.mark.parametrize(
    ("group", "queries", "tokens", "own", "left"),
    [
        (1, 128, 1024, 64, True),  # 0 + 256: both fill their tiles
        (1, 64, 1024, 32, False),  # -1,024 + 128
        (1, 64, 128, 32, True),  # -128 + 128: even
        (1, 64, 192, 32, False),  # -192 + 128
        (8, 16, 64, 8, True),  # 0 + 32: tiles of 8
        (1, 16, 64, 8, False),  # -64 + 32
        (1, 128, 1024, 65, False),  # tiles(128) = 2, of the parts 2 + 1
        (1, 32, 4096, 32, True),  # the last one
    ],
)
def test_pats_rule(group: int, queries: int, tokens: int, own: int, left: bool) -> None:
    assert pat(group)(queries, tokens, own, 64) is left


@pytest.mark.parametrize("rule", [fasttree(4), pat(4)], ids=["fasttree", "pat"])
def test_a_rules_plan_covers_what_the_rows_see(rule: Leaves) -> None:
    asked = [
        Asked([*range(end), *range(100 + 9 * i, 103 + 9 * i)], (end + 3) * 64 - i)
        for i, end in enumerate((4, 12, 12, 12, 20, 20, 24, 24, 24))
    ]
    step = geometry(asked, Layout.F32)
    chains = chains_of(step)
    forest = without_edges(build_forest(chains), chains, rule)
    assert covers(plan_of(step, chains, forest), step)
