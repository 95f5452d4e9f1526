r"""A kept forest whose leaves have moved: the last level is permuted, what is shared stays.

      [0, 32)                 [0, 32)
     /   |   \       ->      /   |   \        a ended, b went on twice: b' is a fork of b
    a    b    c             b    b'   c

A chain that moved is known by its pages. It hangs below the deepest node whose pages it holds, as a
chain that did not move shows them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kvkeep.attention.chains import Chain
from kvkeep.attention.contraction import MIN_NODE_TOKENS
from kvkeep.attention.tree import Forest, Node
from kvkeep.types import PAGE_TOKENS

_NODE_PAGES = MIN_NODE_TOKENS // PAGE_TOKENS

_Children = dict[int, list[int]]
"""Below each inner node, -1 for the roots: inner nodes, and chains as -1 - index."""


def with_moved(
    forest: Forest, chains: Sequence[Chain], moved: Collection[int], *, across_scopes: bool
) -> Forest | None:
    """Return the forest with every chain of `moved` in its new place, O(batch).

    None where a fresh forest may share more: a chain holds no node, has pages for one more node in
    common with a neighbour, or leaves a node that fewer than two children go on from.
    """
    witnesses = [_witness(forest, node, moved) for node in forest.nodes]
    children = _children(forest, moved)
    parents: set[int] = set()
    for index in moved:
        at = _deepest(forest, chains, children, witnesses, index, across_scopes=across_scopes)
        if at < 0:
            return None
        children[at].append(-1 - index)
        parents.add(at)
    if any(len(below) < 2 for parent, below in children.items() if parent >= 0):
        return None
    for parent in parents:
        begin = forest.nodes[parent].end
        held = [chains[-1 - c if c < 0 else witnesses[c]] for c in children[parent]]
        if _share(held, begin, sum(-1 - c in moved for c in children[parent])):
            return None
    return _depth_first(forest, chains, children)


def _witness(forest: Forest, node: Node, moved: Collection[int]) -> int:
    """Return a chain below a node that did not move, -1 where there is none."""
    below = forest.order[node.first : node.last]
    return next((index for index in below if index not in moved), -1)


def _children(forest: Forest, moved: Collection[int]) -> _Children:
    """Return what hangs below each inner node once the chains of `moved` are taken away."""
    children: _Children = {-1: []}
    for index, node in enumerate(forest.nodes):
        if node.last - node.first > 1:
            children[index] = []
            children[node.parent].append(index)
        elif forest.order[node.first] not in moved:
            children[node.parent].append(-1 - forest.order[node.first])
    return children


def _deepest(
    forest: Forest,
    chains: Sequence[Chain],
    children: _Children,
    witnesses: Sequence[int],
    index: int,
    *,
    across_scopes: bool,
) -> int:
    """Return the deepest inner node that a chain holds whole, -1 where it holds none."""
    chain, at = chains[index], -1

    def holds(node: Node, witness: int) -> bool:
        if witness < 0 or chain.shareable < node.end:
            return False
        shown = chains[witness]
        run = slice(node.begin, node.end)
        return (across_scopes or shown.scope == chain.scope) and np.array_equal(
            shown.pages[run], chain.pages[run]
        )

    while True:
        inner = (child for child in children[at] if child >= 0)
        below = next((c for c in inner if holds(forest.nodes[c], witnesses[c])), None)
        if below is None:
            return at
        at = below


def _share(held: Sequence[Chain], begin: int, moved: int) -> bool:
    """Tell whether one of the last `moved` chains has a node's pages after `begin` in common."""
    end, seen = begin + _NODE_PAGES, set()
    for place, chain in enumerate(held):
        if chain.shareable >= end:
            key = chain.pages[begin:end].tobytes()
            if place >= len(held) - moved and key in seen:
                return True
            seen.add(key)
    return False


def _depth_first(forest: Forest, chains: Sequence[Chain], children: _Children) -> Forest:
    """Return the forest of `children`, nodes numbered and chains placed anew."""
    order: list[int] = []
    nodes: list[Node] = []
    todo = [(child, -1) for child in reversed(children[-1])]
    while todo:
        child, parent = todo.pop()
        begin = nodes[parent].end if parent >= 0 else 0
        if child < 0:
            index, place = -1 - child, len(order)
            order.append(index)
            nodes.append(Node(begin, len(chains[index].pages), parent, place, place + 1))
        else:
            nodes.append(Node(begin, forest.nodes[child].end, parent, len(order), 0))
            todo.extend((c, len(nodes) - 1) for c in reversed(children[child]))
    for node in reversed(nodes):
        if node.parent >= 0:
            above = nodes[node.parent]
            nodes[node.parent] = above._replace(last=max(above.last, node.last))
    return Forest(tuple(order), tuple(nodes))
