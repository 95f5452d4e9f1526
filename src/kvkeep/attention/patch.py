r"""A kept forest whose leaves have moved: the last level is permuted, what is shared stays.

      [0, 32)                 [0, 32)
     /   |   \       ->      /   |   \        a ended, b went on twice: b' is a fork of b
    a    b    c             b    b'   c

A chain that moved is known by its pages. It hangs below the deepest node whose pages it holds, as a
chain that did not move shows them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from kvkeep.attention.chains import Chain
from kvkeep.attention.contraction import MIN_NODE_TOKENS
from kvkeep.attention.tree import Children, Forest, children_of, depth_first
from kvkeep.types import PAGE_TOKENS

_NODE_PAGES = MIN_NODE_TOKENS // PAGE_TOKENS


def with_moved(
    forest: Forest, chains: Sequence[Chain], moved: Collection[int], *, across_scopes: bool
) -> Forest | None:
    """Return the forest with every chain of `moved` in its new place, O(batch).

    None where a fresh forest may share more: a chain holds no node, has pages for one more node in
    common with a neighbour, or leaves a node that fewer than two children go on from.
    """
    children = children_of(forest, moved)
    stems = {
        index: stem
        for index in children
        if index >= 0 and (stem := _stem(forest, chains, index, moved)) is not None
    }
    parents: set[int] = set()
    for index in moved:
        at = _deepest(children, stems, chains[index], across_scopes=across_scopes)
        if at < 0:
            return None
        children[at].append(-1 - index)
        parents.add(at)
    if any(len(below) < 2 for parent, below in children.items() if parent >= 0):
        return None
    for parent in parents:
        held = [chains[-1 - c] if c < 0 else stems[c].witness for c in children[parent]]
        if _share(held, stems[parent].end, sum(-1 - c in moved for c in children[parent])):
            return None
    return depth_first(forest, chains, children)


class _Stem(NamedTuple):
    """What a chain must hold to hang below an inner node, beside what its parent asks for."""

    begin: int
    end: int
    pages: bytes
    witness: Chain
    """A chain below the node that did not move."""


def _stem(
    forest: Forest, chains: Sequence[Chain], index: int, moved: Collection[int]
) -> _Stem | None:
    """Return an inner node's own pages; None where all chains below it moved."""
    node = forest.nodes[index]
    below = forest.order[node.first : node.last]
    found = next((chain for chain in below if chain not in moved), None)
    if found is None:
        return None
    witness = chains[found]
    return _Stem(node.begin, node.end, witness.pages[node.begin : node.end].tobytes(), witness)


def _deepest(
    children: Children, stems: Mapping[int, _Stem], chain: Chain, *, across_scopes: bool
) -> int:
    """Return the deepest inner node that a chain holds whole, -1 where it holds none."""

    def holds(stem: _Stem | None) -> bool:
        return (
            stem is not None
            and chain.shareable >= stem.end
            and (across_scopes or stem.witness.scope == chain.scope)
            and chain.pages[stem.begin : stem.end].tobytes() == stem.pages
        )

    at = -1
    while True:
        inner = (child for child in children[at] if child >= 0)
        below = next((child for child in inner if holds(stems.get(child))), None)
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
