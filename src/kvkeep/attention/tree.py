"""The forest of a step's page chains: which requests hold which pages in common.

Chains are sorted by their shareable pages, so that whatever any of them have in common is held by
neighbours; the forest follows from how many leading pages each has in common with the one before.
Cost: one sort and one comparison of neighbours, O(pages + batch).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvkeep.attention.chains import STEP_PAGES, Chain


class Node(NamedTuple):
    """Pages [begin, end) of the chains at places [first, last) of the forest's order."""

    begin: int
    end: int
    parent: int
    """Index of the node that ends where this begins; -1 for roots."""
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Forest:
    """Chains in depth-first order, and nodes, parents before children.

    Every chain ends in a leaf of its own, which may be empty.
    """

    order: tuple[int, ...]
    """Index of the chain at each place."""
    nodes: tuple[Node, ...]


Children = dict[int, list[int]]
"""Below each inner node, -1 for the roots: inner nodes, and chains as -1 - index."""


def flat_forest(chains: Sequence[Chain]) -> Forest:
    """Return the forest in which nobody shares."""
    nodes = tuple(Node(0, len(chain.pages), -1, i, i + 1) for i, chain in enumerate(chains))
    return Forest(tuple(range(len(chains))), nodes)


def build_forest(chains: Sequence[Chain], *, across_scopes: bool = True) -> Forest:
    """Return the forest of all pages that at least two chains share, in steps of 128 tokens."""
    keys = [
        (
            "" if across_scopes else chain.scope,
            chain.pages[: chain.shareable].astype(">i4").tobytes(),
        )
        for chain in chains
    ]
    order = sorted(range(len(chains)), key=lambda i: keys[i])
    common = [0] * len(order)
    for place in range(1, len(order)):
        one, other = order[place - 1], order[place]
        if keys[one][0] == keys[other][0]:
            common[place] = _common_pages(chains[one], chains[other])
    return Forest(tuple(order), tuple(_nodes(chains, order, common)))


def _common_pages(one: Chain, other: Chain) -> int:
    """Return how many leading shareable pages two chains have in common, in whole steps."""
    count = min(one.shareable, other.shareable)
    differ = np.flatnonzero(one.pages[:count] != other.pages[:count])
    count = int(differ[0]) if len(differ) else count
    return count - count % STEP_PAGES


def _nodes(chains: Sequence[Chain], order: Sequence[int], common: Sequence[int]) -> list[Node]:
    """Return the nodes; `common` [place] is shared with the place before."""
    nodes: list[Node] = []
    todo = [(0, len(order), 0, -1)] if order else []
    while todo:
        first, last, depth, parent = todo.pop()
        if last - first == 1:
            nodes.append(Node(depth, len(chains[order[first]].pages), parent, first, last))
            continue
        shared = min(common[first + 1 : last])
        if shared > depth:
            nodes.append(Node(depth, shared, parent, first, last))
            depth, parent = shared, len(nodes) - 1
        cuts = [p for p in range(first + 1, last) if common[p] <= depth]
        bounds = [first, *cuts, last]
        children = [(begin, end, depth, parent) for begin, end in pairwise(bounds)]
        todo.extend(reversed(children))
    return nodes


def children_of(forest: Forest, moved: Collection[int] = ()) -> Children:
    """Return what hangs below each inner node, the chains of `moved` taken away."""
    children: Children = {-1: []}
    for index, node in enumerate(forest.nodes):
        if node.last - node.first > 1:
            children[index] = []
            children[node.parent].append(index)
        elif forest.order[node.first] not in moved:
            children[node.parent].append(-1 - forest.order[node.first])
    return children


def depth_first(forest: Forest, chains: Sequence[Chain], children: Children) -> Forest:
    """Return the forest of `children`, nodes numbered and chains placed anew.

    A node ends where it did; it begins where its parent ends.
    """
    order: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    lasts: list[int] = []
    todo = [(child, -1) for child in reversed(children[-1])]
    while todo:
        child, parent = todo.pop()
        begin, place = spans[parent][1] if parent >= 0 else 0, len(order)
        if child < 0:
            order.append(-1 - child)
            spans.append((begin, len(chains[-1 - child].pages), parent, place))
        else:
            spans.append((begin, forest.nodes[child].end, parent, place))
            todo.extend((below, len(lasts)) for below in reversed(children[child]))
        lasts.append(len(order))
    for index in range(len(spans) - 1, -1, -1):
        parent = spans[index][2]
        if parent >= 0:
            lasts[parent] = max(lasts[parent], lasts[index])
    nodes = (Node(*span, last) for span, last in zip(spans, lasts, strict=True))
    return Forest(tuple(order), tuple(nodes))
