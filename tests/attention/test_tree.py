"""A forest is what its definition says: every shared step once, for all who share it."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvkeep.attention.chains import Chain
from kvkeep.attention.tree import Forest, Node, build_forest, flat_forest
from tests.attention.chained import (
    branching,
    chain,
    expected_nodes,
    is_whole,
    nodes_of,
)
from tests.counts import examples


def test_no_chains_make_no_nodes() -> None:
    assert build_forest([]) == flat_forest([]) == Forest((), ())


def test_a_flat_forest_has_a_root_per_chain() -> None:
    forest = flat_forest([chain([1, 2, 3]), chain([1, 2])])
    assert forest == Forest((0, 1), (Node(0, 3, -1, 0, 1), Node(0, 2, -1, 1, 2)))


def test_one_prefix_and_two_leaves() -> None:
    forest = build_forest([chain([1, 2, 3, 4, 8]), chain([1, 2, 3, 4, 9, 7])])
    assert forest.nodes == (Node(0, 4, -1, 0, 2), Node(4, 5, 0, 0, 1), Node(4, 6, 0, 1, 2))


def test_several_roots_in_one_step() -> None:
    chains = [
        chain([5, 6, 1]),
        chain([7, 8, 2]),
        chain([5, 6, 3]),
        chain([9, 4]),
        chain([7, 8, 9]),
    ]
    forest = build_forest(chains)
    assert is_whole(forest, chains)
    roots = {who for who, begin, _ in nodes_of(forest) if begin == 0}
    assert roots == {frozenset([0, 2]), frozenset([1, 4]), frozenset([3])}


def test_a_chain_that_is_a_prefix_of_another_ends_at_an_inner_node() -> None:
    whole = list(range(9))
    chains = [chain(whole), chain(whole[:7]), chain(whole[:5]), chain(whole[:3])]
    forest = build_forest(chains)
    assert nodes_of(forest) == {
        (frozenset([0, 1, 2, 3]), 0, 2),
        (frozenset([0, 1, 2]), 2, 4),
        (frozenset([0, 1]), 4, 6),
        (frozenset([3]), 2, 3),
        (frozenset([2]), 4, 5),
        (frozenset([1]), 6, 7),
        (frozenset([0]), 6, 9),
    }


def test_duplicates_share_one_node() -> None:
    chains = [chain([1, 2, 3, 4, 5])] * 3
    assert nodes_of(build_forest(chains)) == {
        (frozenset([0, 1, 2]), 0, 4),
        *((frozenset([i]), 4, 5) for i in range(3)),
    }


def test_a_chain_wholly_shared_keeps_an_empty_leaf() -> None:
    chains = [chain([1, 2], shareable=2), chain([1, 2, 3, 4], shareable=4)]
    forest = build_forest(chains)
    assert (frozenset([0]), 2, 2) in nodes_of(forest)
    assert is_whole(forest, chains)


@pytest.mark.parametrize(("equal", "shared"), [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_nodes_are_cut_at_whole_steps(equal: int, shared: int) -> None:
    chains = [chain([*range(equal), 50, 51, 52]), chain([*range(equal), 60, 61, 62])]
    inner = [n for n in build_forest(chains).nodes if n.last - n.first > 1]
    assert [(n.begin, n.end) for n in inner] == ([(0, shared)] if shared else [])


def test_equal_pages_behind_a_difference_are_not_shared() -> None:
    chains = [chain([1, 2, 3, 4, 5]), chain([8, 9, 3, 4, 5])]
    assert nodes_of(build_forest(chains)) == nodes_of(flat_forest(chains))


def test_a_node_of_more_than_128_pages() -> None:
    prefix = list(range(1000, 1300))
    chains = [chain([*prefix, i]) for i in range(3)]
    assert (frozenset([0, 1, 2]), 0, 300) in nodes_of(build_forest(chains))


def test_slots_above_a_byte_sort_with_their_equals() -> None:
    """Slots whose low bytes alone would order them otherwise still stand beside their equals."""
    chains = [chain([256 * i, 255, 7]) for i in (1, 3, 2, 1, 3, 2)]
    assert nodes_of(build_forest(chains)) == expected_nodes(chains)
    assert len(build_forest(chains).nodes) == 9


def test_scopes_stay_apart_where_asked() -> None:
    prefix = list(range(4))
    chains = [chain([*prefix, 10 + i], scope="ab"[i % 2]) for i in range(4)]
    together = build_forest(chains)
    assert (frozenset(range(4)), 0, 4) in nodes_of(together)
    apart = build_forest(chains, across_scopes=False)
    assert {who for who, _, _ in nodes_of(apart) if len(who) > 1} == {
        frozenset([0, 2]),
        frozenset([1, 3]),
    }
    assert is_whole(apart, chains)


@given(chains=branching(), across=st.booleans())
@settings(max_examples=examples(100, 300), deadline=None)
def test_any_forest_is_whole_and_maximal(chains: list[Chain], across: bool) -> None:
    forest = build_forest(chains, across_scopes=across)
    assert is_whole(forest, chains)
    assert nodes_of(forest) == expected_nodes(chains, across_scopes=across)
    assert len(nodes_of(forest)) == len(forest.nodes)
    for index, node in enumerate(forest.nodes):
        assert node.parent < index
        if node.last - node.first > 1:
            assert node.begin % 2 == node.end % 2 == 0
            assert node.begin < node.end


@given(chains=branching(), seed=st.integers(0, 999))
@settings(max_examples=examples(40, 100), deadline=None)
def test_the_order_of_requests_does_not_matter(chains: list[Chain], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(chains)).tolist()
    shuffled = build_forest([chains[i] for i in order])
    renamed = {
        (frozenset(order[i] for i in who), begin, end) for who, begin, end in nodes_of(shuffled)
    }
    assert renamed == nodes_of(build_forest(chains))


def fastest(chains: list[Chain]) -> float:
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        build_forest(chains)
        times.append(time.perf_counter() - begun)
    return min(times)


def test_building_takes_time_in_proportion_to_pages() -> None:
    """A comparison of every pair, or a walk in Python, would take seconds."""
    prefix = list(range(2000))
    chains = [chain([*prefix, *range(10_000 + 48 * i, 10_048 + 48 * i)]) for i in range(64)]
    assert fastest(chains) < 0.05


def test_a_deep_chain_of_nodes_is_built_without_recursion() -> None:
    whole = list(range(4000))
    chains = [chain(whole[: 2 * i + 3]) for i in range(1500)]
    forest = build_forest(chains)
    assert len(forest.nodes) == 2 * 1500 - 1
    ends = [forest.nodes[-1]]
    while ends[-1].parent >= 0:
        ends.append(forest.nodes[ends[-1].parent])
    assert len(ends) == 1500
